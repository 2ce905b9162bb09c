#!/bin/sh
# In the container: what was compiled when the image was built goes where it is looked for.
set -eu
mkdir -p "$AFTERIMAGE_CACHE_DIR"
cp -rn /opt/afterimage/prepared/. "$AFTERIMAGE_CACHE_DIR/"
exec afterimage "$@"
