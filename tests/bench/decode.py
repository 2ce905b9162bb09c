"""Decoding time against CompressAI's `decompress()` on the same bytes, in one process, interleaved.

make bench
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compressai.models import MeanScaleHyperprior

from models import checkpoint, codec, image, zoo

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
ROUNDS = 7


def main() -> int:
    own = zoo.load(2)
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    weights = {k: v.float() for k, v in checkpoint.load(entry).items() if v.is_floating_point()}
    reference = MeanScaleHyperprior(own.net.N, own.net.M)
    reference.update()
    reference.load_state_dict({**reference.state_dict(), **weights})
    reference.update(force=True)
    reference.eval()
    x = codec.to_tensor(image.read(PHOTO.read_bytes(), 10**7))
    b = own.encode(x, "compressai", "float")
    exact = own.encode(x, "msh", "exact")

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            made: torch.Tensor = reference.decompress([[b.y_string], [b.z_string]], (8, 12))[
                "x_hat"
            ]
        return made

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "CompressAI decompress()": theirs,
        "ours, float": lambda: own.synthesis(own.latents(b).y_hat),
        "ours, exact": lambda: own.synthesis(own.latents(exact).y_hat),
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()  # compiled and warm
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                spent[name].append(time.perf_counter() - began)
        base = statistics.median(spent["CompressAI decompress()"])
        print(f"768x512, {threads} thread(s), median of {ROUNDS}:")  # noqa: T201
        for name, values in spent.items():
            median = statistics.median(values)
            print(f"  {name:<26}{median * 1e3:8.1f} ms  {base / median:5.2f} x")  # noqa: T201
    difference = float((theirs() - ways["ours, float"]()).abs().max()) * 255
    print(f"largest difference: {difference:.4f} / 255")  # noqa: T201
    return 0 if difference <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
