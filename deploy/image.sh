#!/bin/sh
# Build the image: deploy/image.sh [cpu|cuda]. Uses docker, podman or buildah, whichever works
# (ENGINE= chooses). BASE=, PIP_INDEX_URL= and PIP_EXTRA_INDEX_URL= become build arguments.
#
# buildah needs no registry: if the base image is missing, deploy/base.sh makes one with mmdebstrap.
# With chroot isolation it needs no container runtime and no privileged daemon.
set -eu
cd "$(dirname "$0")/.."
target=${1:-cpu}
base=${BASE:-python:3.11-slim}

works() {
    case $1 in
    docker) docker info ;;
    podman) podman info && podman run --rm --pull=newer "$base" true ;;
    buildah) buildah --version ;;
    esac >/dev/null 2>&1
}

engine=${ENGINE:-}
for candidate in docker podman buildah; do
    [ -n "$engine" ] || ! works "$candidate" || engine=$candidate
done
if [ -z "$engine" ]; then
    echo "no docker, podman or buildah works here; for example: apt-get install buildah mmdebstrap" >&2
    exit 1
fi
echo "engine: $engine" >&2

set -- --target "$target" --tag "afterimage:$target" --build-arg "BASE=$base" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || set -- "$@" --build-arg "$name=$value"
done

if [ "$engine" = buildah ]; then
    export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}"
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        deploy/base.sh "$base"
    fi
    exec buildah bud --isolation chroot --network host --format docker "$@" .
fi
[ "$engine" != podman ] || set -- --format docker "$@"  # the OCI format has no health checks
exec "$engine" build "$@" .
