"""Decoding against CompressAI's `decompress()`: the same bytes, one process, interleaved.

make bench PART=decode

With the shipped weights, half of whose channels do not reach the picture (ours leaves them out,
CompressAI does not), and with weights that use every channel.
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

sys.path.append(str(Path(__file__).parent))
import machine

from models import checkpoint, geometry, image
from models.codec import bitstream, codec, rans, zoo
from models.codec.codec import Codec
from models.codec.inference_synthesis import InferenceSynthesis
from models.codec.msh import GDN
from models.codec.synthesis import Synthesis
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
SIZES = ((768, 512), (2048, 1360), (3840, 2160))
THREADS = (1, 2)
QUALITY = 2
WEIGHTS = ("shipped", "every channel")


def one(weights: str, width: int, height: int, kept: Path) -> dict[str, Any]:
    """Figures of one size in this process; its bitstream is left in `kept`."""
    own = _codec(weights)
    photo = image.read(PHOTO.read_bytes(), 10**7)
    across = -(-height // photo.shape[0]), -(-width // photo.shape[1])
    x = codec.to_tensor(np.tile(photo, (*across, 1))[:height, :width].copy())
    streams = [bitstream.serialize(own.encode(x, f, "exact")) for f in ("compressai", "msh")]
    b, exact = (bitstream.parse(data) for data in streams)
    kept.write_bytes(streams[1])
    reference = _reference(own)
    shape = [side // 64 for side in geometry.padded(height, width)]

    def theirs() -> Tensor:
        made: Tensor = reference.decompress([[b.y_string], [b.z_string]], shape)["x_hat"]
        return made

    ways: dict[str, Callable[[], Tensor]] = {
        "compressai": theirs,
        "float": lambda: own.reconstruct(b)[1],
        "exact": lambda: own.reconstruct(exact)[1],
    }
    with torch.inference_mode():
        pictures = {name: way() for name, way in ways.items()}  # compiled and warm
        ms = _interleaved(ways, 7 if width < 1000 else 2)
        stages = _stages(own, b, 5 if width < 1000 else 2)
    rate = machine.gflops()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        InferenceSynthesis(own.net.g_s)(own.latents(b).y_hat)  # windows' overlaps count as loss
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


def alone(weights: str, kept: Path) -> dict[str, Any]:
    """The memory of a process that only decodes."""
    own = _codec(weights)
    own.reconstruct(bitstream.parse(kept.read_bytes()))
    return {"peak_mib": machine.peak_mib()}


def _codec(weights: str) -> Codec:
    own = zoo.load(QUALITY)
    if weights == "shipped":
        return own
    for layer in own.net.g_s:  # too little to be seen, and yet to be computed
        p = layer.gamma if isinstance(layer, GDN) else layer.weight
        assert isinstance(p, torch.Tensor)
        p.data[p.abs() < 2e-5] = 2e-5  # GDN's pedestal is 1.5e-5
    return replace(own, synthesis=Synthesis(own.net.g_s, own.net.M))


def _reference(own: Codec) -> Any:
    entry = next(e for e in checkpoint.manifest() if e.quality == QUALITY)
    weights = {k: v.float() for k, v in checkpoint.load(entry).items() if v.is_floating_point()}
    reference = zoo.compressai_model(own.net.N, own.net.M)
    reference.update()
    reference.load_state_dict({**reference.state_dict(), **weights})
    reference.g_s.load_state_dict(own.net.g_s.state_dict(), strict=False)
    reference.update(force=True)
    return reference.eval()


def _interleaved(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest: the machine is shared, and what disturbs it only ever adds."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            spent[name].append((time.perf_counter() - began) * 1e3)
    return {name: min(values) for name, values in spent.items()}


def _stages(own: Codec, b: bitstream.Bitstream, rounds: int) -> dict[str, float]:
    """Milliseconds of the parts of ours, `float` profile."""
    h = own.latent_coder
    size = geometry.padded(b.height, b.width)
    contexts = np.broadcast_to(
        np.arange(own.net.N, dtype=np.int32)[:, None, None],
        (own.net.N, size[0] // 64, size[1] // 64),
    )
    contexts = np.ascontiguousarray(contexts)
    z = rans.decode(b.z_string, contexts, h.z_tables)
    z_hat = torch.from_numpy(z)[None].float() + h.medians
    y_hat = own.latents(b).y_hat
    parts: dict[str, Callable[[], Any]] = {
        "z": lambda: rans.decode(b.z_string, contexts, h.z_tables),
        "h_s": lambda: own.net.h_s(z_hat),
        "latents": lambda: own.latents(b),
        "g_s": lambda: own.synthesis(y_hat),
    }
    ms = _interleaved(parts, rounds)
    ms["other"] = ms["latents"] - ms["h_s"] - ms["z"]  # indexes, y, its bits and its sum
    return ms


def _table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    head = ["weights", "size", "threads", "CompressAI ms", "float ms", "ratio", "exact ms", "ratio"]
    head += ["z", "h_s", "other", "g_s", "float ms/MP", "g_s of sgemm", "gap /255", "MiB"]
    lines = [
        "# Decoding\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "Bytes to latents to picture, without the picture's file. MiB: peak of a process that does"
        " only this.\n",
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
        weights, *size, kept = sys.argv[1:]
        found = (
            one(weights, int(size[0]), int(size[1]), Path(kept))
            if size
            else alone(weights, Path(kept))
        )
        print(json.dumps(found))  # noqa: T201
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/stream"
        for weights, threads, size in product(WEIGHTS, THREADS, SIZES):
            row = machine.alone(__file__, threads, weights, *size, kept)
            rows.append(
                row | machine.alone(__file__, threads, weights, kept) | {"threads": threads}
            )
    about = machine.describe()
    machine.write("decode", {"machine": about, "rows": rows}, _table(rows, about))
    return 0 if all(r["difference"] <= 1 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
