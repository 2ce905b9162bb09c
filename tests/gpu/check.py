"""GPU check: compare CUDA with the CPU, run each trainer for a minute, and time the tiers.

make gpu-check            exits with 3 without a CUDA device, with 1 if a check fails

`--device cpu` runs the same checks on the CPU, for work on the checks themselves.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import image, library
from models.checkpoint import WEIGHTS
from models.codec import codec, zoo
from models.codec.synthesis import Synthesis
from models.diffusion import decoder, noise
from models.diffusion.decoder import Decoder, DiffusionInput
from models.diffusion.presets import PAPER
from models.diffusion.unet import UNet
from models.tiers import TIERS, Settings, decoder_for
from tests.bench import machine

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
assert (_settings := TIERS["perceptual"].settings) is not None
PERCEPTUAL = _settings
Decoders = Mapping[int, Decoder]
"""Decoders for `tiers.decoder_for`."""
GOAL_MS = {
    "instant": 15.0,
    "compact, a step": 4.0,
    "ddim-10, bytes to PNG": 120.0,
    "paper, a step": 30.0,
}
"""Goals of the design for 768×512 on one H100; a missed goal does not fail the check."""
GOAL_PICTURES_S = 40.0
TRAINERS = {
    "msh": ("msh", "2"),
    "compact": ("diffusion", "--preset", "compact", "phase1"),
    "small": (
        *("diffusion", "--preset", "small", "--calls", "1"),
        *("--narrow", str(WEIGHTS / "decoder_compact.safetensors"), "perceptual"),
    ),
    "paper": ("diffusion", "--preset", "paper", "phase1"),
}
"""Name -> arguments of `python -m models.train`, the last of them the stage to run."""


class Check:
    """Results of the checks; `failed` is set if a value exceeds its limit."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, False
        self.results: dict[str, Any] = {}

    def holds(self, name: str, value: float, limit: float) -> None:
        """Check that `value` is at most `limit`."""
        ok = value <= limit
        self.failed |= not ok
        self.results[name] = {"value": value, "limit": limit, "holds": ok}
        print(f"{'ok  ' if ok else 'FAIL'}  {name}: {value:.4g} (at most {limit:g})")  # noqa: T201

    def timed(self, name: str, ms: float, goal: float | None = None) -> None:
        """Record a time; a missed goal does not fail the check."""
        self.results[name] = {"ms": ms, "reach_ms": goal}
        verdict = "" if goal is None else "  reached" if ms <= goal else "  MISSED"
        print(f"      {name}: {ms:.1f} ms" + (f" of {goal:g}" if goal else "") + verdict)  # noqa: T201

    def fastest(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Milliseconds of the fastest of `rounds` calls, after one to warm up."""
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


def tiled_photo(q2: codec.Codec, width: int, height: int, seed: int = 0) -> DiffusionInput:
    """The sample photograph, tiled to this size and encoded."""
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-height // photo.shape[0]), -(-width // photo.shape[1])
    pixels = np.tile(photo, (*across, 1))[:height, :width].copy()
    latents = q2.latents(q2.encode(codec.to_tensor(pixels), "msh", "exact"))
    return DiffusionInput(latents, q2.synthesis(latents.y_hat), 2, seed)


def levels(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and mean absolute difference of two pictures, in 1/255."""
    gap = (a - b).abs() * 255
    return float(gap.max()), float(gap.mean())


def equality(check: Check, q2: codec.Codec, on_cpu: Decoders, on_device: Decoders) -> None:
    """Check that the device gives the same pictures as the CPU, alone and in batches."""
    device = check.device
    a, b = (noise.words(7, 3, (64, 64), device=d).cpu() for d in (None, device))
    check.holds("noise, integers that differ", float((a != b).sum()), 0)
    a, b = (noise.normals(7, 3, (3, 256, 256), device=d).cpu() for d in (None, device))
    check.holds("noise, largest difference", float((a - b).abs().max()), 1e-5)

    small = tiled_photo(q2, 384, 256)
    g_s = Synthesis(copy.deepcopy(q2.net.g_s), q2.net.M, device)
    worst, _ = levels(g_s(small.latents.y_hat), small.x_hat)
    check.holds("instant picture, 1/255", worst, 1.0)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(device.type, dtype):
            worst, mean = levels(g_s(small.latents.y_hat), small.x_hat)
        check.holds(f"instant picture in {dtype}, mean 1/255", mean, 0.5)
    for name, settings in (("perceptual", PERCEPTUAL), ("ddpm, 10 steps", Settings("ddpm", 10))):
        pictures = [
            decoder_for(decoders, settings).sample_batch([small], settings)
            for decoders in (on_cpu, on_device)
        ]
        worst, mean = levels(*pictures)
        check.holds(f"{name}, mean 1/255", mean, 0.5)
        check.holds(f"{name}, largest 1/255", worst, 16.0)
    served = library.load().decoder(PERCEPTUAL)
    check.holds("workers use another device", float(served.device.type != device.type), 0)
    previews: list[Tensor] = []
    served.sample_batch(
        [small], PERCEPTUAL, lambda _step, _steps, preview: previews.append(preview())
    )
    pixels = [codec.to_pixels(codec.crop(preview, 256, 384)) for preview in previews]
    check.holds("missing previews", float(PERCEPTUAL.steps - len(pixels)), 0)
    batch = [tiled_photo(q2, 384, 256, seed) for seed in range(4)]
    perceptual = decoder_for(on_device, PERCEPTUAL)
    together = perceptual.sample_batch(batch, PERCEPTUAL)
    alone = torch.cat([perceptual.sample_batch([item], PERCEPTUAL) for item in batch])
    check.holds("a batch of 4 against each alone, mean 1/255", levels(together, alone)[1], 0.1)


def timings(
    check: Check, q2: codec.Codec, decoders: Decoders, sizes: list[tuple[int, int]]
) -> None:
    """Time every tier, a step of each preset, and a batch."""
    diffusion = decoders[0]
    g_s = Synthesis(copy.deepcopy(q2.net.g_s), q2.net.M, check.device)
    for width, height in sizes:
        first = (width, height) == sizes[0]
        size, item = f"{width}x{height}", tiled_photo(q2, width, height)
        b = q2.encode(codec.to_tensor(codec.to_pixels(item.x_hat)), "msh", "exact")

        def instant(b: Any = b) -> Tensor:
            return g_s(q2.latents(b).y_hat)

        def to_png(b: Any = b) -> bytes:
            latents = q2.latents(b)
            x = diffusion.sample(latents, g_s(latents.y_hat), 2, Settings("ddim", 10), 0)
            return image.write(codec.to_pixels(x), "png")

        check.timed(
            f"instant {size}", check.fastest(instant), GOAL_MS["instant"] if first else None
        )
        goal = GOAL_MS["ddim-10, bytes to PNG"] if first else None
        check.timed(f"ddim-10, bytes to PNG {size}", check.fastest(to_png, 2), goal)
        goal = GOAL_MS["compact, a step"] if first else None
        check.timed(f"compact, a step {size}", step_ms(check, diffusion, item), goal)
        for tier in TIERS.values():
            if tier.settings is not None and (first or tier.settings.steps <= 100):
                settings = tier.settings

                def whole(item: DiffusionInput = item, settings: Settings = settings) -> Tensor:
                    return decoder_for(decoders, settings).sample_batch([item], settings)

                rounds = 3 if tier.settings.steps <= 10 else 1
                check.timed(f"{tier.name} {size}", check.fastest(whole, rounds))
        paper = Decoder("0" * 16, UNet(PAPER), check.device)
        goal = GOAL_MS["paper, a step"] if first else None
        check.timed(f"paper, a step {size}", step_ms(check, paper, item), goal)
        del paper
    many = [tiled_photo(q2, *sizes[0], seed) for seed in range(16)]
    perceptual = decoder_for(decoders, PERCEPTUAL)
    rate = 16e3 / check.fastest(lambda: perceptual.sample_batch(many, PERCEPTUAL), 2)
    check.results["16 together, pictures/s"] = {"value": rate, "reach": GOAL_PICTURES_S}
    print(f"      16 together: {rate:.1f} pictures/s of {GOAL_PICTURES_S:g}")  # noqa: T201


def step_ms(check: Check, diffusion: Decoder, item: DiffusionInput) -> float:
    """Milliseconds of a step: eight steps minus four, which cancels the conditioner's time."""
    four, eight = [
        check.fastest(lambda n=n: diffusion.sample_batch([item], Settings("ddim", n)), 2)  # type: ignore[misc]
        for n in (4, 8)
    ]
    return (eight - four) / 4


def trainers(check: Check, labels: list[str], minutes: float) -> None:
    """Run each trainer on crops of the sample photograph; check that it exits without an error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = image.read(PHOTO.read_bytes(), 10**7)
        for i in range(12):
            y, x = divmod(i, 4)
            crop = photo[y * 80 : y * 80 + 352, x * 128 : x * 128 + 384]
            prefix = "bsds_val_" if i > 9 else "cut_"
            Image.fromarray(crop).save(folder / f"{prefix}{i}.png")
        for label in labels:
            *arguments, stage = TRAINERS[label]
            arguments += ["--plan", f"{stage}:{minutes}", "--photos", name]
            command = [sys.executable, "-m", "models.train", *arguments]
            command += ["--out", str(folder / label), "--device", check.device.type]
            done = subprocess.run(command, capture_output=True, text=True)
            check.holds(f"trainer {label}, failed", float(done.returncode != 0), 0)
            if done.returncode:
                print(done.stderr[-2000:])  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each trainer; default: 1")
    parser.add_argument("--trainers", nargs="*", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--sizes", nargs="+", default=["768x512", "3840x2160"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; use --device cpu to run the checks on the CPU")  # noqa: T201
        return 3
    check = Check(torch.device(args.device))
    q2 = zoo.load(2)
    on_cpu, on_device = decoder.load_all(), decoder.load_all(device=check.device)
    equality(check, q2, on_cpu, on_device)
    trainers(check, args.trainers, args.minutes)
    sizes = [(int(w), int(h)) for w, h in (size.split("x") for size in args.sizes)]
    timings(check, q2, on_device, sizes)
    if args.device == "cuda":
        document = {"machine": machine.describe(), "found": check.results}
        machine.write("gpu", document, "")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
