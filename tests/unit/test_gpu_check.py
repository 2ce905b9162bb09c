"""`make gpu-check` on a machine that has no CUDA device, or whose devices are hidden."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "gpu/check.py"


def test_without_a_device_it_says_so_and_exits_3() -> None:
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (
        3,
        "no CUDA device; use --device cpu to run the checks on the CPU\n",
    )
