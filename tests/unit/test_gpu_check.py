"""`make gpu-check` on a machine that has no CUDA device, or whose devices are hidden."""

import os
import runpy
import sys
from pathlib import Path

from tests.support.forked import Forked

SCRIPT = Path(__file__).parents[1] / "gpu/check.py"


def test_without_a_device_it_says_so_and_exits_3(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Forked(run, os.environ | {"CUDA_VISIBLE_DEVICES": ""}, log)
    assert (process.wait(60), log.read_text()) == (
        3,
        "no CUDA device; use --device cpu to run the checks on the CPU\n",
    )


def run() -> int:
    """What the process of `make gpu-check` runs."""
    sys.argv = [str(SCRIPT)]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return 0
