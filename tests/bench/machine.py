"""What a figure depends on besides the code: the machine, its threads, its memory."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, str]:
    """Processor and versions that the figures belong to."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": f"{len(names)} x {names[0] if names else platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def gflops(size: int = 2048, rounds: int = 5) -> float:
    """float32 matrix products on as many threads as torch has now: the best of `rounds`."""
    a, b = torch.randn(2, size, size)
    best = 0.0
    for _ in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def peak_mib() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def resident_mb(pid: int) -> float:
    """Resident memory of a process now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def alone(script: str, threads: int, *arguments: object) -> dict[str, Any]:
    """What `script` prints as JSON, run in a process of its own on `threads` threads."""
    command = [sys.executable, "-P", "-W", "ignore", script, *map(str, arguments)]
    # threads that sleep while they wait, as in the product's own processes
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write(name: str, document: dict[str, Any], text: str) -> None:
    """`results/NAME.json` and `.md`; the text is printed too."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)  # noqa: T201
