"""Checkpoints: a folder of small files that stays readable if the process is killed at any moment.

Each saved checkpoint is a numbered generation. It consists of files `000012-….safetensors` of at
most 16 MiB, so that they can be uploaded anywhere, and the index `000012.json`, which is written
last and lists the files with their SHA-256. Then older generations are deleted.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from models.errors import WeightsError

LIMIT = 15 << 20
"""Largest size of the tensors and headers in a file, in bytes."""
_HEADER = 256
"""Bytes reserved for one tensor's name, shape and offsets in the header of a file."""
_GENERATION = re.compile(r"^(\d{6})[-.]")

State = dict[str, dict[str, Tensor]]
"""Tensors by part ("net", "net_average", …) and name."""


def save(folder: Path, state: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]) -> None:
    """Write `state` and `facts` (JSON values) as a new generation, then delete older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((_number(p) for p in folder.iterdir()), default=0) + 1
    files: dict[str, str] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for part, tensors in state.items():
        shapes[part] = {name: list(t.shape) for name, t in tensors.items()}
        for i, shard in enumerate(_shards(tensors)):
            data = save_bytes(shard)
            name = f"{number:06d}-{part}-{i:03d}.safetensors"
            _write(folder / name, data)
            files[name] = hashlib.sha256(data).hexdigest()
    index = {"files": files, "shapes": shapes, "facts": facts}
    _write(folder / f"{number:06d}.part", json.dumps(index).encode())
    os.replace(folder / f"{number:06d}.part", folder / f"{number:06d}.json")
    for path in folder.iterdir():
        if 0 < _number(path) < number:
            path.unlink()


def exists(folder: Path) -> bool:
    """Return True if `folder` holds the index of a generation."""
    return any(folder.glob("[0-9]*.json"))


def load(folder: Path, device: torch.device | None = None) -> tuple[State, dict[str, Any]]:
    """Return state (on `device`, by default the CPU) and facts of the newest intact generation.

    Raises `WeightsError` with the name of the damaged file if no generation is intact.
    """
    failure: WeightsError | None = None
    for index in sorted(folder.glob("[0-9]*.json"), reverse=True):
        try:
            return _read(index, device or torch.device("cpu"))
        except WeightsError as e:
            failure = failure or e
    raise failure or WeightsError(f"{folder}: no checkpoint")


def _read(path: Path, device: torch.device) -> tuple[State, dict[str, Any]]:
    try:
        index = json.loads(path.read_text())
        pieces: dict[str, dict[str, list[Tensor]]] = {part: {} for part in index["shapes"]}
        for name, digest in index["files"].items():
            data = (path.parent / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise WeightsError(f"{path.parent / name}: its SHA-256 is not the one in the index")
            of_part = pieces[name.split("-")[1]]
            for key, value in sorted(load_bytes(data).items()):
                of_part.setdefault(key.rpartition("#")[0], []).append(value.to(device))
        state = {
            part: {name: torch.cat(of_part[name]).reshape(shape) for name, shape in shapes.items()}
            for (part, shapes), of_part in zip(
                index["shapes"].items(), pieces.values(), strict=True
            )
        }
        return state, index["facts"]
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"{path}: {e}") from e


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Flatten `tensors`, split them into pieces `name#0000` and group these into files.

    No file exceeds `LIMIT` bytes.
    """
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for i, piece in enumerate(torch.split(flat, (LIMIT - _HEADER) // flat.element_size())):
            needed = piece.numel() * piece.element_size() + _HEADER
            if shard and size + needed > LIMIT:
                yield shard
                shard, size = {}, 0
            shard[f"{name}#{i:04d}"] = piece.clone()
            size += needed
    if shard:
        yield shard


def _write(path: Path, data: bytes) -> None:
    """Write and fsync, so that after a power cut no index exists without its shards."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _number(path: Path) -> int:
    """Return the generation of a file; 0 for files that belong to no checkpoint."""
    match = _GENERATION.match(path.name)
    return int(match[1]) if match else 0
