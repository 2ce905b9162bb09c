#!/bin/sh
# In the image's build: install the wheel, check every weights file's digest, and compile what is
# compiled at first use. numba knows its sources by their time, which layers keep to the second.
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
library.load().warm_up()
'
chmod -R a+rX "$AFTERIMAGE_CACHE_DIR"

# No pip, no tests, of OpenVINO what runs on a CPU, and no plots, which only CompressAI's own
# command line draws.
"$bin/pip" uninstall --yes matplotlib fonttools kiwisolver contourpy pip
site=$(dirname "$sources")
find "$site" -type d -name tests -prune -exec rm -rf {} +
rm -f "$site"/openvino/libs/libopenvino_intel_[gn]pu_plugin* "$site"/openvino/libs/cache.json \
    "$site"/openvino/libs/libopenvino_[!i]*_frontend*
"$bin/python" -P -c '
import service.app, worker.tasks
from models import interchange, zoo
zoo.reference(128, 192)
'
