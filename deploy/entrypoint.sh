#!/bin/sh
# In the container: what was compiled when the image was built goes where it is looked for.
set -eu
cp -rn /opt/afterimage/prepared/. "$AFTERIMAGE_CACHE_DIR/" ||
    echo "$AFTERIMAGE_CACHE_DIR cannot be written: this start compiles anew" >&2
exec afterimage "$@"
