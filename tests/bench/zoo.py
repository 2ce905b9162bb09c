"""Benchmark of each architecture of CompressAI's zoo: its `decompress()` and our decoder.

make bench PART=zoo

The weights are random, with the channels of the best quality; the latents have many values. Both
decode the same bytes in one process, in turns. Memory is the peak of a process that only decodes.
"""

import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import geometry, image
from models.codec import codec
from models.codec import zoo as codecs
from models.codec.architectures import ARCHITECTURES
from models.codec.codec import Codec
from tests.bench import machine
from tests.support import zoo
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
THREADS = (1, 2)
ROUNDS = 3


def measure(name: str, file: Path) -> dict[str, Any]:
    """Time both decoders with one architecture; write the strings to `file`."""
    theirs, ours = _models(name)
    x = codec.to_tensor(image.read(PHOTO.read_bytes(), 10**6))
    b = ours.encode(x, "compressai", "float")
    file.write_bytes(len(b.y_string).to_bytes(4) + b.y_string + b.z_string)
    shape = [side // (64 if b.z_string else 16) for side in geometry.padded(b.height, b.width)]
    strings = [[s] for s in (b.y_string, b.z_string) if s]
    times: dict[str, list[float]] = {"compressai": [], "ours": [], "entropy": []}
    with torch.inference_mode():
        latents, picture = ours.reconstruct(b)  # compiles
        for _ in range(ROUNDS):
            began = time.perf_counter()
            expected = theirs.decompress(strings, shape)["x_hat"]
            times["compressai"].append(time.perf_counter() - began)
            began = time.perf_counter()
            latents, picture = ours.reconstruct(b)
            times["ours"].append(time.perf_counter() - began)
            began = time.perf_counter()
            ours.latents(b)
            times["entropy"].append(time.perf_counter() - began)
    return {
        "model": name,
        "channels": ARCHITECTURES[name].channels[-1],
        "bytes": len(b.y_string) + len(b.z_string),
        "ms": {who: min(values) * 1e3 for who, values in times.items()},
        "difference": float((picture - expected).abs().max()) * 255,
        "values": len(np.unique(latents.symbols)),
    }


def measure_memory(who: str, name: str, file: Path) -> dict[str, Any]:
    """Peak memory of a process that only decodes the strings in `file`."""
    theirs, ours = _models(name)
    data, before = file.read_bytes(), machine.peak_mib()
    size = 4 + int.from_bytes(data[:4])
    y_string, z_string = data[4:size], data[size:]
    height, width = image.read(PHOTO.read_bytes(), 10**6).shape[:2]
    padded = geometry.padded(height, width)
    with torch.inference_mode():
        if who == "ours":
            latents = ours.latent_coder.decode(y_string, z_string, padded, "float")
            ours.synthesis(latents.y_hat)
        else:
            strings = [[s] for s in (y_string, z_string) if s]
            theirs.decompress(strings, [side // (64 if z_string else 16) for side in padded])
    return {"peak_mib": machine.peak_mib(), "before_mib": before}


def _models(name: str) -> tuple[Any, Codec]:
    theirs = zoo.reference(name, *ARCHITECTURES[name].channels[-1])
    state = codecs.with_tables(zoo.parameters(theirs))
    return theirs, codecs.from_tensors(state, ARCHITECTURES[name].qualities, model=name)


def _table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    head = ["model", "N, M", "threads", "KB", "CompressAI ms", "ours ms", "ratio"]
    head += ["of it entropy ms", "CompressAI MiB", "ours MiB", "gap /255"]
    lines = [
        "# Decoding each codec of CompressAI's zoo, 768×512\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "From bytes to the picture; random weights with the channels of the best quality.\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for r in rows:
        ms = r["ms"]
        cells = [
            r["model"], "{}, {}".format(*r["channels"]), str(r["threads"]),
            f"{r['bytes'] / 1e3:.0f}", f"{ms['compressai']:.0f}", f"{ms['ours']:.0f}",
            f"{ms['compressai'] / ms['ours']:.1f}", f"{ms['entropy']:.0f}",
            str(r["compressai_mib"]), str(r["ours_mib"]), f"{r['difference']:.4f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    prepare_process(WorkerSettings())
    if len(sys.argv) > 1:
        *who, name, file = sys.argv[1:]
        if who:
            measured = measure_memory(who[0], name, Path(file))
        else:
            measured = measure(name, Path(file))
        print(json.dumps(measured))  # noqa: T201
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/strings"
        for threads, model in product(THREADS, ARCHITECTURES):
            row = machine.alone(__file__, threads, model, file) | {"threads": threads}
            for decoder in ("compressai", "ours"):
                alone = machine.alone(__file__, threads, decoder, model, file)
                row[f"{decoder}_mib"] = alone["peak_mib"]
            rows.append(row)
    about = machine.describe()
    machine.write("zoo", {"machine": about, "rows": rows}, _table(rows, about))
    return 0 if all(r["difference"] <= 1 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
