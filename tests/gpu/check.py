"""CUDA against the CPU, one minute of each trainer, and timings against the design's figures.

make gpu-check            exits 3 where there is no CUDA device, 1 where a check fails

`--device cpu` runs the same checks without a device, to work on them.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import machine

from models import image, library
from models.codec import codec, zoo
from models.codec.synthesis import Synthesis
from models.diffusion import decoder, noise
from models.diffusion.decoder import Decoder, DiffusionInput
from models.diffusion.presets import PAPER
from models.diffusion.unet import UNet
from models.tiers import TIERS, Settings

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
PERCEPTUAL = Settings("ddim", 4, beta=1.0)
REACH_MS = {
    "instant": 15.0,
    "compact, a step": 4.0,
    "ddim-10, bytes to PNG": 120.0,
    "paper, a step": 30.0,
}
"""The design's "reach" column, at 768×512 on one H100."""
REACH_PICTURES_S = 40.0
TRAINERS = {
    "msh": ("msh", "2"),
    "compact": ("diffusion", "--preset", "compact", "phase1"),
    "paper": ("diffusion", "--preset", "paper", "phase1"),
}
"""Commands of `python -m models.train`, with the stage that each runs."""


class Check:
    """Collects what was found; `failed` where a tolerance did not hold."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, False
        self.found: dict[str, Any] = {}

    def holds(self, name: str, value: float, limit: float) -> None:
        """`value` must be at most `limit`."""
        good = value <= limit
        self.failed |= not good
        self.found[name] = {"value": value, "limit": limit, "holds": good}
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {value:.4g} (at most {limit:g})")  # noqa: T201

    def timed(self, name: str, ms: float, reach: float | None = None) -> None:
        """A timing misses its figure without failing the check."""
        self.found[name] = {"ms": ms, "reach_ms": reach}
        verdict = "" if reach is None else "  reached" if ms <= reach else "  MISSED"
        print(f"      {name}: {ms:.1f} ms" + (f" of {reach:g}" if reach else "") + verdict)  # noqa: T201

    def fastest(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Milliseconds of the best of some calls, after one to warm up."""
        call()
        best = float("inf")
        for _ in range(rounds):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            best = min(best, (time.perf_counter() - began) * 1e3)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def draft(own: codec.Codec, width: int, height: int, seed: int = 0) -> DiffusionInput:
    """A picture of this size made of the sample photograph."""
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-height // photo.shape[0]), -(-width // photo.shape[1])
    pixels = np.tile(photo, (*across, 1))[:height, :width].copy()
    latents = own.latents(own.encode(codec.to_tensor(pixels), "msh", "exact"))
    return DiffusionInput(latents, own.synthesis(latents.y_hat), 2, seed)


def levels(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and mean difference of two pictures in 1/255."""
    gap = (a - b).abs() * 255
    return float(gap.max()), float(gap.mean())


def equality(check: Check, own: codec.Codec, here: Decoder, there: Decoder) -> None:
    """The same pictures as on the CPU, alone and in batches."""
    device = check.device
    a, b = (noise.words(7, 3, (64, 64), device=d).cpu() for d in (None, device))
    check.holds("noise integers that differ", float((a != b).sum()), 0)
    a, b = (noise.normals(7, 3, (3, 256, 256), device=d).cpu() for d in (None, device))
    check.holds("noise, largest difference", float((a - b).abs().max()), 1e-5)

    small = draft(own, 384, 256)
    on_device = Synthesis(copy.deepcopy(own.net.g_s), own.net.M, device)
    worst, _ = levels(on_device(small.latents.y_hat), small.x_hat)
    check.holds("instant picture, 1/255", worst, 1.0)
    for kind in (torch.float16, torch.bfloat16):
        with torch.autocast(device.type, kind):
            worst, mean = levels(on_device(small.latents.y_hat), small.x_hat)
        check.holds(f"instant picture in {kind}, mean 1/255", mean, 0.5)
    for name, settings in (("perceptual", PERCEPTUAL), ("ddpm, 10 steps", Settings("ddpm", 10))):
        pictures = [d.sample_batch([small], settings) for d in (here, there)]
        worst, mean = levels(*pictures)
        check.holds(f"{name}, mean 1/255", mean, 0.5)
        check.holds(f"{name}, largest 1/255", worst, 16.0)
    served = library.load().diffusion
    check.holds("workers draw elsewhere", float(served.device.type != device.type), 0)
    previews: list[Tensor] = []
    served.sample_batch([small], PERCEPTUAL, lambda _step, _steps, now: previews.append(now()))
    pixels = [codec.to_pixels(codec.crop(preview, 256, 384)) for preview in previews]
    check.holds("previews that are missing", float(PERCEPTUAL.steps - len(pixels)), 0)
    batch = [draft(own, 384, 256, seed) for seed in range(4)]
    together = there.sample_batch(batch, PERCEPTUAL)
    alone = torch.cat([there.sample_batch([d], PERCEPTUAL) for d in batch])
    check.holds("a batch of 4 against each alone, mean 1/255", levels(together, alone)[1], 0.1)


def timings(check: Check, own: codec.Codec, there: Decoder, sizes: list[tuple[int, int]]) -> None:
    """Every tier, a step of each preset, and a batch."""
    g_s = Synthesis(copy.deepcopy(own.net.g_s), own.net.M, check.device)
    for width, height in sizes:
        first = (width, height) == sizes[0]
        at, given = f"{width}x{height}", draft(own, width, height)
        b = own.encode(codec.to_tensor(codec.to_pixels(given.x_hat)), "msh", "exact")

        def instant(b: Any = b) -> Tensor:
            return g_s(own.latents(b).y_hat)

        def finished(b: Any = b, given: DiffusionInput = given) -> bytes:
            latents = own.latents(b)
            x = there.sample(latents, g_s(latents.y_hat), 2, Settings("ddim", 10), 0)
            return image.write(codec.to_pixels(x), "png")

        check.timed(f"instant {at}", check.fastest(instant), REACH_MS["instant"] if first else None)
        reach = REACH_MS["ddim-10, bytes to PNG"] if first else None
        check.timed(f"ddim-10, bytes to PNG {at}", check.fastest(finished, 2), reach)
        reach = REACH_MS["compact, a step"] if first else None
        check.timed(f"compact, a step {at}", step_ms(check, there, given), reach)
        for tier in TIERS.values():
            if tier.settings is not None and (first or tier.settings.steps <= 100):
                chosen = tier.settings

                def whole(given: DiffusionInput = given, chosen: Settings = chosen) -> Tensor:
                    return there.sample_batch([given], chosen)

                rounds = 3 if tier.settings.steps <= 10 else 1
                check.timed(f"{tier.name} {at}", check.fastest(whole, rounds))
        paper = Decoder("0" * 16, UNet(PAPER), check.device)
        reach = REACH_MS["paper, a step"] if first else None
        check.timed(f"paper, a step {at}", step_ms(check, paper, given), reach)
        del paper
    many = [draft(own, *sizes[0], seed) for seed in range(16)]
    rate = 16e3 / check.fastest(lambda: there.sample_batch(many, PERCEPTUAL), 2)
    check.found["16 together, pictures/s"] = {"value": rate, "reach": REACH_PICTURES_S}
    print(f"      16 together: {rate:.1f} pictures/s of {REACH_PICTURES_S:g}")  # noqa: T201


def step_ms(check: Check, drawing: Decoder, given: DiffusionInput) -> float:
    """One step: eight of them less four, so that what is done once drops out."""
    spent = [
        check.fastest(lambda n=n: drawing.sample_batch([given], Settings("ddim", n)), 2)  # type: ignore[misc]
        for n in (4, 8)
    ]
    return (spent[1] - spent[0]) / 4


def trainers(check: Check, labels: list[str], minutes: float) -> None:
    """Each trainer on cuts of the sample photograph; what matters is that it runs to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = image.read(PHOTO.read_bytes(), 10**7)
        for i in range(12):
            y, x = divmod(i, 4)
            cut = photo[y * 80 : y * 80 + 352, x * 128 : x * 128 + 384]
            prefix = "bsds_val_" if i > 9 else "cut_"
            Image.fromarray(cut).save(folder / f"{prefix}{i}.png")
        for label in labels:
            *words, stage = TRAINERS[label]
            words += ["--plan", f"{stage}:{minutes}", "--photos", name]
            command = [sys.executable, "-m", "models.train", *words]
            command += ["--out", str(folder / label), "--device", check.device.type]
            done = subprocess.run(command, capture_output=True, text=True)
            check.holds(f"trainer {label}, failed", float(done.returncode != 0), 0)
            if done.returncode:
                print(done.stderr[-2000:])  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each trainer")
    parser.add_argument("--trainers", nargs="*", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--sizes", nargs="+", default=["768x512", "3840x2160"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")  # noqa: T201
        return 3
    check = Check(torch.device(args.device))
    own = zoo.load(2)
    here, there = decoder.load(), decoder.load(device=check.device)
    equality(check, own, here, there)
    trainers(check, args.trainers, args.minutes)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    timings(check, own, there, sizes)
    if args.device == "cuda":
        document = {"machine": machine.describe(), "found": check.found}
        machine.write("gpu", document, "")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
