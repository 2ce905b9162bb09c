"""Benchmark of the diffusion decoder: time and memory per step and per tier, at three sizes.

make bench PART=diffusion
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import image
from models.codec import codec, zoo
from models.diffusion import decoder
from models.diffusion.decoder import Decoder, DiffusionInput
from models.tiers import TIERS, Settings, decoder_for
from tests.bench import machine
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
SIZES = ((768, 512), (2048, 1360), (3840, 2160))
THREADS = (1, 2)
ROUNDS = 5


def measure(width: int, height: int) -> dict[str, Any]:
    """Measure one picture size in this process, so that its peak memory belongs to this size."""
    shipped, item = decoder.load(), _input(width, height)
    once, steps = [], []
    for _ in range(2):
        times = _step_times(shipped, item, ROUNDS if width < 1000 else 2)
        once.append(times[0])
        steps += times[1:]
    step = min(steps)  # the fastest, because other load on the machine can only add time
    maps = min(once) - step
    rate = machine.gflops()
    flops = _flops(shipped, item)
    result = {
        "size": f"{width}x{height}",
        "once_s": maps,
        "step_s": step,
        "step_us_per_pixel": step / (width * height) * 1e6,
        "step_gmac": flops / 2e9,
        "sgemm_gflops": rate,
        "share_of_sgemm": flops / step / 1e9 / rate,
        "tiers_s": {t.name: maps + t.settings.calls * step for t in TIERS.values() if t.settings},
        "peak_mib": machine.peak_mib(),
    }
    if width < 1000:
        result["measured_s"] = {n: _tier(item, n) for n in ("perceptual", "ddim-10")}
        result["openvino_step_s"] = _openvino(shipped, item)
    return result


def _input(width: int, height: int) -> DiffusionInput:
    """The sample photograph, tiled to this size and encoded at quality 2."""
    q2 = zoo.load(2)
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-width // photo.shape[1]), -(-height // photo.shape[0])
    pixels = np.tile(photo, (across[1], across[0], 1))[:height, :width].copy()
    latents = q2.latents(q2.encode(codec.to_tensor(pixels), "msh", "exact"))
    return DiffusionInput(latents, q2.synthesis(latents.y_hat), 2, 0)


def _step_times(diffusion: Decoder, item: DiffusionInput, count: int) -> list[float]:
    """Seconds of conditioner and first step together, then of `count` single steps."""
    marks = [time.perf_counter()]
    diffusion.sample_batch(
        [item], Settings("ddim", count + 1), lambda *_: marks.append(time.perf_counter())
    )
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def _tier(item: DiffusionInput, tier: str) -> float:
    """Seconds of a whole tier."""
    settings = TIERS[tier].settings
    assert settings is not None
    diffusion = decoder_for(decoder.load_all(), settings)
    began = time.perf_counter()
    diffusion.sample_batch([item], settings)
    return time.perf_counter() - began


def _flops(diffusion: Decoder, item: DiffusionInput) -> float:
    """FLOPs of one step: those of two steps minus those of one."""
    totals = []
    for count in (1, 2):
        with FlopCounterMode(display=False) as counter:
            diffusion.sample_batch([item], Settings("ddim", count))
        totals.append(counter.get_total_flops())
    return float(totals[1] - totals[0])


def _openvino(diffusion: Decoder, item: DiffusionInput) -> float | None:
    """Seconds of the same step in OpenVINO, to compare with torch; None if it is not installed."""
    try:
        import openvino
    except ImportError:
        return None

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = diffusion.net.denoiser

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            x_t, t, quality, beta, *maps = inputs
            out: torch.Tensor = self.denoiser(x_t, t, tuple(maps), quality, beta)
            return out

    _, _, height, width = item.x_hat.shape
    c = diffusion.config
    widths = zip(c.condition, c.map_strides, strict=True)
    maps = [torch.randn(1, w, height // s, width // s) for w, s in widths]
    x_t, half = torch.randn(1, 3, height, width), torch.tensor([0.5])
    inputs = (x_t, half, torch.tensor([2]), half, *maps)
    flat = Flat().eval()
    model = openvino.convert_model(flat, example_input=inputs)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 on CPUs that support it
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = [i.numpy() for i in inputs]
    with torch.inference_mode():
        gap = np.abs(request.infer(arrays)[0] - flat(*inputs).numpy()).max()
    if gap > 1e-3:
        raise RuntimeError(
            f"OpenVINO's output differs from torch's by {gap}; at most 1e-3 is allowed"
        )
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        request.infer(arrays, share_inputs=True)
        times.append(time.perf_counter() - began)
    return min(times)


def _table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    tiers = [t.name for t in TIERS.values() if t.settings]
    head = ["size", "threads", "once ms", "step ms", "µs/px", "GMAC/step", "of sgemm", "MiB"]
    lines = [
        "# Diffusion decoder\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "Fastest of several rounds. Tiers: seconds from the latents to the picture, computed as"
        " once + steps; in brackets the measured time of the whole tier.\n",
        "| " + " | ".join([*head, *tiers]) + " |",
        "|" + "---|" * (len(head) + len(tiers)),
    ]
    for r in rows:
        measured = r.get("measured_s", {})
        cells = [
            r["size"], str(r["threads"]), f"{r['once_s'] * 1e3:.0f}", f"{r['step_s'] * 1e3:.0f}",
            f"{r['step_us_per_pixel']:.2f}", f"{r['step_gmac']:.1f}",
            f"{r['share_of_sgemm']:.0%} of {r['sgemm_gflops']:.0f} GFLOP/s", str(r["peak_mib"]),
        ]  # fmt: skip
        for name in tiers:
            whole = f" ({measured[name]:.1f})" if name in measured else ""
            cells.append(f"{r['tiers_s'][name]:.1f}{whole}")
        lines.append("| " + " | ".join(cells) + " |")
    for r in rows:
        if r.get("openvino_step_s"):
            lines.append(
                f"\nOpenVINO, {r['size']}, {r['threads']} thread(s): "
                f"{r['openvino_step_s'] * 1e3:.0f} ms a step."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    prepare_process(WorkerSettings())
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
        return
    rows = []
    for threads in THREADS:
        for size in SIZES:
            rows.append(machine.alone(__file__, threads, *size) | {"threads": threads})
    about = machine.describe()
    machine.write("diffusion", {"machine": about, "rows": rows}, _table(rows, about))


if __name__ == "__main__":
    main()
