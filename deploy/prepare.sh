#!/bin/sh
# In the image's build: install the wheel, check every weights file's digest, and compile what is
# compiled at first use. numba knows its sources by their time, which layers keep to the second.
set -eu
bin=/opt/afterimage/bin
"$bin/pip" install --no-deps /wheels/*.whl
sources=$("$bin/python" -P -c 'import models; print(*models.__path__)')
find "$sources" -name '*.py' -exec touch -d '2026-01-01' {} +
export AFTERIMAGE_CACHE_DIR=/opt/afterimage/prepared
"$bin/python" -P -c '
from worker.settings import WorkerSettings, prepare_process
prepare_process(WorkerSettings())
from models import library
library.load().warm_up()
'
"$bin/pip" uninstall --yes pip
