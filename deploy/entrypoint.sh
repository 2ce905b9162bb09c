#!/bin/sh
# Entry point of the container: copy the code that was compiled during the build into the cache folder,
# then run `afterimage` with the arguments. `healthy` is the health check: it requests /livez from the
# API at the address it listens on, or checks the age of the worker's heartbeat file.
set -eu
if [ "${1:-}" = healthy ]; then
    case $(head -n 1 /tmp/role) in
    worker) find "$AFTERIMAGE_CACHE_DIR/alive" -name "$(cat /etc/hostname)-*" -mmin -0.5 | grep -q . ;;
    *) python3 -c '
import argparse, urllib.request
p = argparse.ArgumentParser()
p.add_argument("--host"), p.add_argument("--port", default="8000")
args, _ = p.parse_known_args(open("/tmp/role").read().splitlines())
host = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
host = f"[{host}]" if ":" in host else host
urllib.request.urlopen(f"http://{host}:{args.port}/livez", timeout=3)' ;;
    esac
    exit
fi
cp -rn /opt/afterimage/prepared/. "$AFTERIMAGE_CACHE_DIR/" ||
    echo "$AFTERIMAGE_CACHE_DIR is not writable: the code is compiled again at this start" >&2
printf '%s\n' "$@" >/tmp/role || true
exec afterimage "$@"
