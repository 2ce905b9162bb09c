"""Shared by the benchmarks: the machine, its speed and memory, child processes, result files."""

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

from models import processor

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""Sets of vector instructions that the measured code makes use of."""
RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, str]:
    """Processor and its vector instructions, GPU, and versions of torch and Python."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = processor.flags()
    return {
        "cpu": f"{len(models)} x {models[0] if models else platform.machine()}",
        "instructions": " ".join(name for name in INSTRUCTIONS if name in flags),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def gflops(size: int = 2048, rounds: int = 5) -> float:
    """GFLOP/s of a float32 matrix product with torch's current threads: the best of `rounds`."""
    a, b = torch.randn(2, size, size)
    best = 0.0
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def peak_mib() -> int:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def resident_mb(pid: int) -> float:
    """Current resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def alone(script: str, threads: int, *arguments: object) -> dict[str, Any]:
    """Run `script` in a separate process with `threads` threads; return the JSON that it prints."""
    command = [sys.executable, "-P", "-W", "ignore", script, *map(str, arguments)]
    # waiting threads sleep instead of spinning, as in the service's processes
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def write(name: str, document: dict[str, Any], text: str) -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and print the text."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)  # noqa: T201
