"""Benchmark of decoding against CompressAI's `decompress()`: same bytes, one process, interleaved.

make bench PART=decode

Measured with the shipped weights, half of whose channels have no effect on the picture (our decoder
skips them, CompressAI does not), and with weights that use every channel.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import checkpoint, geometry, image
from models.codec import bitstream, codec, rans, zoo
from models.codec.codec import Codec
from models.codec.inference_synthesis import InferenceSynthesis
from models.codec.msh import GDN
from models.codec.synthesis import Synthesis
from tests.bench import machine
from tests.support.compressai import mean_scale_hyperprior
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
SIZES = ((768, 512), (2048, 1360), (3840, 2160))
THREADS = (1, 2)
QUALITY = 2
WEIGHTS = ("shipped", "every channel")


def measure(weights: str, width: int, height: int, file: Path) -> dict[str, Any]:
    """Measure one picture size in this process; write its bitstream to `file`."""
    ours = _codec(weights)
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-height // photo.shape[0]), -(-width // photo.shape[1])
    x = codec.to_tensor(np.tile(photo, (*across, 1))[:height, :width].copy())
    streams = [bitstream.serialize(ours.encode(x, f, "exact")) for f in ("compressai", "msh")]
    b, exact = (bitstream.parse(data) for data in streams)
    file.write_bytes(streams[1])
    reference = compressai(ours)
    shape = [side // 64 for side in geometry.padded(height, width)]

    def decompress() -> Tensor:
        x_hat: Tensor = reference.decompress([[b.y_string], [b.z_string]], shape)["x_hat"]
        return x_hat

    decoders: dict[str, Callable[[], Tensor]] = {
        "compressai": decompress,
        "float": lambda: ours.reconstruct(b)[1],
        "exact": lambda: ours.reconstruct(exact)[1],
    }
    with torch.inference_mode():
        pictures = {name: decode() for name, decode in decoders.items()}  # compiles and warms up
        ms = interleaved(decoders, 7 if width < 1000 else 2)
        stages = _stages(ours, b, 5 if width < 1000 else 2)
    rate = machine.gflops()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        InferenceSynthesis(ours.net.g_s)(ours.latents(b).y_hat)  # useful FLOPs, no overlaps
    g_s_gflops = counter.get_total_flops() / stages["g_s"] / 1e6
    return {
        "weights": weights,
        "size": f"{width}x{height}",
        "ms": ms,
        "ratio": {name: ms["compressai"] / ms[name] for name in ("float", "exact")},
        "stages_ms": stages,
        "float_ms_per_megapixel": ms["float"] / (width * height) * 1e6,
        "difference": float((pictures["compressai"] - pictures["float"]).abs().max()) * 255,
        "sgemm_gflops": rate,
        "g_s_share_of_sgemm": g_s_gflops / rate,
    }


def measure_memory(weights: str, file: Path) -> dict[str, Any]:
    """Peak memory of a process that only decodes the bitstream in `file`."""
    ours = _codec(weights)
    ours.synthesis(ours.latents(bitstream.parse(file.read_bytes())).y_hat)
    return {"peak_mib": machine.peak_mib()}


def _codec(weights: str) -> Codec:
    shipped = zoo.load(QUALITY)
    if weights == "shipped":
        return shipped
    for layer in shipped.net.g_s:  # too small to change a pixel, but every channel is computed
        p = layer.gamma if isinstance(layer, GDN) else layer.weight
        assert isinstance(p, torch.Tensor)
        p.data[p.abs() < 2e-5] = 2e-5  # GDN's pedestal is 1.5e-5
    return replace(shipped, synthesis=Synthesis(shipped.net.g_s, shipped.net.M))


def compressai(ours: Codec) -> Any:
    """CompressAI's model with the same weights."""
    entry = next(e for e in checkpoint.manifest() if e.quality == QUALITY)
    weights = {k: v.float() for k, v in checkpoint.load(entry).items() if v.is_floating_point()}
    reference = mean_scale_hyperprior(ours.net.N, ours.net.M)
    reference.update()
    reference.load_state_dict({**reference.state_dict(), **weights})
    reference.g_s.load_state_dict(ours.net.g_s.state_dict(), strict=False)
    reference.update(force=True)
    return reference.eval()


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time the calls in turns; milliseconds of the fastest round of each.

    The fastest, because other load on the machine can only add time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: min(values) for name, values in times.items()}


def _stages(ours: Codec, b: bitstream.Bitstream, rounds: int) -> dict[str, float]:
    """Milliseconds of each stage of our decoder, `float` profile."""
    h = ours.latent_coder
    size = geometry.padded(b.height, b.width)
    contexts = np.broadcast_to(
        np.arange(ours.net.N, dtype=np.int32)[:, None, None],
        (ours.net.N, size[0] // 64, size[1] // 64),
    )
    contexts = np.ascontiguousarray(contexts)
    z = rans.decode(b.z_string, contexts, h.z_tables)
    z_hat = torch.from_numpy(z)[None].float() + h.medians
    y_hat = ours.latents(b).y_hat
    stages: dict[str, Callable[[], Any]] = {
        "z": lambda: rans.decode(b.z_string, contexts, h.z_tables),
        "h_s": lambda: ours.net.h_s(z_hat),
        "latents": lambda: ours.latents(b),
        "g_s": lambda: ours.synthesis(y_hat),
    }
    ms = interleaved(stages, rounds)
    ms["other"] = (
        ms["latents"] - ms["h_s"] - ms["z"]
    )  # CDF indices, decoding y, bit map, adding the means
    return ms


def _table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    head = ["weights", "size", "threads", "CompressAI ms", "float ms", "ratio", "exact ms", "ratio"]
    head += ["z", "h_s", "other", "g_s", "float ms/MP", "g_s of sgemm", "gap /255", "MiB"]
    lines = [
        "# Decoding\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "Times are from the bytes to the decoded picture, without writing a PNG. MiB: peak memory"
        " of a process that only decodes.\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for r in rows:
        ms, stages = r["ms"], r["stages_ms"]
        cells = [
            r["weights"], r["size"], str(r["threads"]),
            f"{ms['compressai']:.0f}", f"{ms['float']:.0f}",
            f"{r['ratio']['float']:.2f}", f"{ms['exact']:.0f}", f"{r['ratio']['exact']:.2f}",
            *(f"{stages[name]:.1f}" for name in ("z", "h_s", "other", "g_s")),
            f"{r['float_ms_per_megapixel']:.0f}",
            f"{r['g_s_share_of_sgemm']:.0%} of {r['sgemm_gflops']:.0f}",
            f"{r['difference']:.4f}", str(r["peak_mib"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    prepare_process(WorkerSettings())
    if len(sys.argv) > 1:
        weights, *sides, file = sys.argv[1:]
        result = (
            measure(weights, int(sides[0]), int(sides[1]), Path(file))
            if sides
            else measure_memory(weights, Path(file))
        )
        print(json.dumps(result))  # noqa: T201
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/stream"
        for weights, threads, size in product(WEIGHTS, THREADS, SIZES):
            row = machine.alone(__file__, threads, weights, *size, file)
            rows.append(
                row | machine.alone(__file__, threads, weights, file) | {"threads": threads}
            )
    about = machine.describe()
    machine.write("decode", {"machine": about, "rows": rows}, _table(rows, about))
    return 0 if all(r["difference"] <= 1 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
