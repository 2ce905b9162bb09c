#!/bin/sh
# In the container: what was compiled when the image was built goes where it is looked for. `healthy`
# asks the API where it listens, or how old this worker's sign of life is.
set -eu
if [ "${1:-}" = healthy ]; then
    case $(head -n 1 /tmp/role) in
    worker) find "$AFTERIMAGE_CACHE_DIR/alive" -name "$(cat /etc/hostname)-*" -mmin -0.5 | grep -q . ;;
    *) python3 -c '
import argparse, urllib.request
p = argparse.ArgumentParser()
p.add_argument("--host"), p.add_argument("--port", default="8000")
asked, _ = p.parse_known_args(open("/tmp/role").read().splitlines())
host = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(asked.host, asked.host)
host = f"[{host}]" if ":" in host else host
urllib.request.urlopen(f"http://{host}:{asked.port}/livez", timeout=3)' ;;
    esac
    exit
fi
cp -rn /opt/afterimage/prepared/. "$AFTERIMAGE_CACHE_DIR/" ||
    echo "$AFTERIMAGE_CACHE_DIR cannot be written: this start compiles anew" >&2
printf '%s\n' "$@" >/tmp/role || true
exec afterimage "$@"
