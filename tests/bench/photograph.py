"""Benchmark of reading a photograph in a child process, against reading it in this process.

make bench PART=photograph

The file is kodim23 as a JPEG of 768×512. Both ways alternate, so that other load on the machine
affects both. The interval of the median difference is a bootstrap's.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import image
from models.pictures.process import Limits, PictureReaders, memory_limit
from tests.bench import machine

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
ROUNDS = 120
RESAMPLES = 2000
LIMIT_MS = 5
"""What the child process may add."""
MAX_PIXELS = 20_000_000


def measure(ways: list[Callable[[], object]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Milliseconds of each way (rounds, ways); each is first in every other round."""
    rows = np.zeros((ROUNDS, len(ways)))
    for number in range(-5, ROUNDS):  # the first ones warm up
        for way in range(len(ways))[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            ways[way]()
            rows[max(number, 0), way] = (time.perf_counter() - began) * 1e3
    return rows


def main() -> int:
    out = io.BytesIO()
    Image.open(PHOTO).save(out, "JPEG", quality=95)
    data, limits = out.getvalue(), Limits(MAX_PIXELS, cpu_s=10, elapsed_s=30)
    readers = PictureReaders(memory_limit(MAX_PIXELS))
    readers.start()
    rows = measure(
        [lambda: image.read_with_notes(data, MAX_PIXELS), lambda: readers.read(data, limits)]
    )
    readers.close()
    here, child = np.median(rows, axis=0)
    added = rows[:, 1] - rows[:, 0]
    samples = np.random.default_rng(0).choice(added, (RESAMPLES, ROUNDS))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    about = machine.describe()
    figures = {
        "in_process_ms": here, "child_ms": child, "added_ms": np.median(added),
        "added_low_ms": low, "added_high_ms": high,
    }  # fmt: skip
    document = {"machine": about, "bytes": len(data), "rounds": ROUNDS}
    text = (
        "# Reading a photograph in a child process, JPEG of 768×512\n\n"
        f"{', '.join(f'{name} {value}' for name, value in about.items())}\n\n"
        f"In this process: {here:.1f} ms. In the child process: {child:.1f} ms. "
        f"Median difference of {ROUNDS} pairs: {np.median(added):.1f} ms "
        f"(95 %: {low:.1f} to {high:.1f} ms; limit {LIMIT_MS} ms).\n"
    )
    machine.write("photograph", document | {k: float(v) for k, v in figures.items()}, text)
    return 0 if np.median(added) <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
