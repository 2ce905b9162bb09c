#!/bin/sh
# Runs in the image's build: install the wheel, load all weights (which checks their digests), and
# compile what would be compiled at first use. numba's cache compares the sources' modification times,
# and image layers keep only whole seconds: so all sources get the same round time.
set -eu
bin=/opt/afterimage/bin
"$bin/pip" install --no-deps /wheels/*.whl
sources=$("$bin/python" -P -c 'import models; print(*models.__path__)')
find "$sources" -name '*.py' -exec touch -d '2026-01-01' {} +
"$bin/python" -m compileall -q "$sources"
export AFTERIMAGE_CACHE_DIR=/opt/afterimage/prepared
"$bin/python" -P -c '
from worker.settings import WorkerSettings, prepare_process
prepare_process(WorkerSettings())
from models import library
from models.codec import context
library.load().warm_up()
context.warm_up()
'
chmod -R a+rX "$AFTERIMAGE_CACHE_DIR"

# Remove what the service does not use: pip, tests, OpenVINO's GPU and NPU plugins and its frontends.
# Then check that everything still imports.
"$bin/pip" uninstall --yes pip
site=$(dirname "$sources")
find "$site" -type d -name tests -prune -exec rm -rf {} +
rm -f "$site"/openvino/libs/libopenvino_intel_[gn]pu_plugin* "$site"/openvino/libs/cache.json \
    "$site"/openvino/libs/libopenvino_[!i]*_frontend*
"$bin/python" -P -c '
import service.app, worker.tasks
from models.codec import interchange
'
