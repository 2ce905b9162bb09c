"""Benchmark of the diffusion decoders: time and memory per step and per tier, at three sizes.

make bench PART=diffusion

Measured in each precision that the CPU computes in. The second table has the times from the bytes
to the PNG file, next to CompressAI's `decompress()` of the same picture in the same process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import geometry, image, processor
from models.codec import bitstream, codec, zoo
from models.diffusion import decoder
from models.diffusion.decoder import PRECISION_VARIABLE, Decoder, DiffusionInput
from models.pictures import writing
from models.tiers import TIERS, Settings, decoder_for
from tests.bench import decode, machine
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
SIZES = ((768, 512), (2048, 1360), (3840, 2160))
THREADS = (1, 2)
PERCEPTUAL = "perceptual"
POSTERIOR = [t.name for t in TIERS.values() if t.settings and t.name != PERCEPTUAL]
"""Tiers that the general decoder draws."""
RATIOS = ("instant", PERCEPTUAL)
"""Tiers that are compared with CompressAI's decoder."""


def measure(width: int, height: int) -> dict[str, Any]:
    """Measure one picture size in this process, so that its peak memory belongs to this size."""
    small = width < 1000
    item = _input(width, height)
    one_step, general = (_decoder(name) for name in (PERCEPTUAL, POSTERIOR[0]))
    perceptual = _fastest(lambda: _draw(one_step, item, PERCEPTUAL), 5 if small else 2)
    once, step = _step_times(general, item, 10 if small else 2)
    tiers = {name: once + _settings(name).calls * step for name in POSTERIOR}
    result = {
        "size": f"{width}x{height}",
        "once_s": once,
        "step_s": step,
        "tiers_s": {PERCEPTUAL: perceptual} | tiers,
        "peak_mib": machine.peak_mib(),
    }
    if small:
        rate = machine.gflops()
        flops = {PERCEPTUAL: _flops(one_step, item, 1)}
        flops["step"] = _flops(general, item, 2) - _flops(general, item, 1)
        result["kmac_per_pixel"] = {k: v / 2e3 / (width * height) for k, v in flops.items()}
        result["sgemm_gflops"] = rate
        result["share_of_sgemm"] = {
            PERCEPTUAL: flops[PERCEPTUAL] / perceptual / 1e9 / rate,
            "step": flops["step"] / step / 1e9 / rate,
        }
    return result


def measure_files() -> dict[str, Any]:
    """Seconds from the bytes to a PNG file, and of CompressAI's `decompress()` to the picture."""
    ours, diffusion = zoo.load(2), _decoder(PERCEPTUAL)
    x = codec.to_tensor(image.read(PHOTO.read_bytes(), 10**7))
    b, exact = (
        bitstream.parse(bitstream.serialize(ours.encode(x, f, "exact")))
        for f in ("compressai", "msh")
    )
    reference = decode.compressai(ours)
    shape = [side // 64 for side in geometry.padded(b.height, b.width)]

    def instant() -> bytes:
        x_hat = ours.reconstruct(exact)[1]
        return writing.write(codec.crop_to_pixels(x_hat, b.height, b.width), "png")

    def perceptual() -> bytes:
        latents, x_hat = ours.reconstruct(exact)
        drawn = _draw(diffusion, DiffusionInput(latents, x_hat, 2, 0), PERCEPTUAL)
        return writing.write(codec.crop_to_pixels(drawn, b.height, b.width), "png")

    calls = {
        "compressai": lambda: reference.decompress([[b.y_string], [b.z_string]], shape),
        "instant": instant,
        "perceptual": perceptual,
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
        seconds = {name: ms / 1e3 for name, ms in decode.interleaved(calls, 9).items()}
    return {"compressai_s": seconds.pop("compressai"), "tiers_s": seconds}


def _decoder(tier: str) -> Decoder:
    return decoder_for(decoder.load_all(), _settings(tier))


def _settings(tier: str) -> Settings:
    settings = TIERS[tier].settings
    assert settings is not None
    return settings


def _input(width: int, height: int) -> DiffusionInput:
    """The sample photograph, tiled to this size and encoded at quality 2."""
    q2 = zoo.load(2)
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-width // photo.shape[1]), -(-height // photo.shape[0])
    pixels = np.tile(photo, (across[1], across[0], 1))[:height, :width].copy()
    latents = q2.latents(q2.encode(codec.to_tensor(pixels), "msh", "exact"))
    return DiffusionInput(latents, q2.synthesis(latents.y_hat), 2, 0)


def _draw(diffusion: Decoder, item: DiffusionInput, tier: str) -> torch.Tensor:
    return diffusion.sample_batch([item], _settings(tier))


def _fastest(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round after a first one, which warms up.

    The fastest, because other load on the machine can only add time.
    """
    call()
    return decode.interleaved({"": call}, rounds)[""] / 1e3


def _step_times(diffusion: Decoder, item: DiffusionInput, count: int) -> tuple[float, float]:
    """Seconds once per picture (conditioner), and of the fastest of `count` later steps."""
    marks = [time.perf_counter()]
    diffusion.sample_batch(
        [item], Settings("ddim", count + 1), lambda *_: marks.append(time.perf_counter())
    )
    first, *steps = np.diff(marks)
    return float(first - min(steps)), float(min(steps))


def _flops(diffusion: Decoder, item: DiffusionInput, steps: int) -> float:
    with FlopCounterMode(display=False) as counter:
        diffusion.sample_batch([item], Settings("ddim", steps))
    return float(counter.get_total_flops())


def _table(rows: list[dict[str, Any]], files: list[dict[str, Any]], about: dict[str, str]) -> str:
    head = ["precision", "size", "threads", "once ms", "step ms", "MiB", PERCEPTUAL, *POSTERIOR]
    lines = [
        "# Diffusion decoders\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "`perceptual`: seconds from the latents to the picture, fastest of five pictures of 768×512"
        " or two larger ones. Other tiers, which the general decoder draws: computed as once +"
        " steps, from the fastest of ten steps (of two) of one picture. MiB: peak memory of a"
        " process with both decoders.\n",
        *_rows(head, [_cells(r) for r in rows]),
        "",
    ]
    for r in rows:
        if "kmac_per_pixel" in r:
            kmac, share = r["kmac_per_pixel"], r["share_of_sgemm"]
            lines.append(
                f"- {r['precision']}, {r['threads']} thread(s): `perceptual` has"
                f" {kmac[PERCEPTUAL]:.1f} kMAC per pixel, at {share[PERCEPTUAL]:.0%} of the speed"
                f" of a float32 matrix product ({r['sgemm_gflops']:.0f} GFLOP/s); a step of the"
                f" other tiers {kmac['step']:.1f}, at {share['step']:.0%}."
            )
    lines += [
        "\nSeconds from the bytes of an `.msh` file to a PNG file, 768×512, and the ratio to"
        " CompressAI's `decompress()` of the same picture in the same process, which writes no"
        " file. The tiers of the general decoder: `instant` + the time above.\n",
        *_rows(
            ["precision", "threads", "CompressAI", *(h for n in RATIOS for h in (n, "ratio"))]
            + POSTERIOR,
            [_file_cells(r) for r in files],
        ),
    ]
    return "\n".join(lines) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _cells(r: dict[str, Any]) -> list[str]:
    once, step = (f"{r[key] * 1e3:.0f}" for key in ("once_s", "step_s"))
    tiers = [_rounded(seconds) for seconds in r["tiers_s"].values()]
    return [r["precision"], r["size"], str(r["threads"]), once, step, str(r["peak_mib"]), *tiers]


def _file_cells(r: dict[str, Any]) -> list[str]:
    compressai, tiers = r["compressai_s"], r["tiers_s"]
    cells = [r["precision"], str(r["threads"]), f"{compressai:.3f}"]
    for name in RATIOS:
        cells += [f"{tiers[name]:.3f}", f"{tiers[name] / compressai:.2f}"]
    return cells + [_rounded(tiers[name]) for name in POSTERIOR]


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def main() -> None:
    prepare_process(WorkerSettings())
    if sides := sys.argv[1:]:
        row = measure_files() if sides == ["files"] else measure(*map(int, sides))
        print(json.dumps(row))  # noqa: T201
        return
    rows, files = [], []
    for precision, threads in product(("f32", "bf16"), THREADS):
        if precision == "bf16" and not processor.has_bfloat16():
            continue
        os.environ[PRECISION_VARIABLE] = precision
        about: dict[str, Any] = {"precision": precision, "threads": threads}
        sizes = [about | machine.alone(__file__, threads, *size) for size in SIZES]
        to_file = about | machine.alone(__file__, threads, "files")
        for name in POSTERIOR:
            to_file["tiers_s"][name] = to_file["tiers_s"]["instant"] + sizes[0]["tiers_s"][name]
        rows += sizes
        files.append(to_file)
    described = machine.describe()
    document = {"machine": described, "rows": rows, "files": files}
    machine.write("diffusion", document, _table(rows, files, described))


if __name__ == "__main__":
    main()
