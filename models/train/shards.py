"""A run's state in a folder of small files that is readable after a kill at any moment.

A generation is `000012-….safetensors`, each at most 16 MiB so that it travels through any channel,
and `000012.json`, written last, which names them with their digests. An older generation goes once
the new one's index is in place.
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
"""Bytes of tensors in a file; the header, below, comes on top."""
_HEADER = 256
"""Bytes allowed for a tensor's name, shape and offsets in a file's header."""
_GENERATION = re.compile(r"^(\d{6})[-.]")

State = dict[str, dict[str, Tensor]]
"""Tensors by part ("net", "average", …) and name."""


def save(folder: Path, state: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]) -> None:
    """Write a new generation of `state` and `facts` (JSON), then remove what is older."""
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
    """Whether `folder` holds a whole generation."""
    return any(folder.glob("[0-9]*.json"))


def load(folder: Path, device: torch.device | None = None) -> tuple[State, dict[str, Any]]:
    """The newest generation that is whole, its tensors on `device`.

    Raises `WeightsError`, naming the file, where none is.
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
                raise WeightsError(f"{path.parent / name}: altered since it was written")
            own = pieces[name.split("-")[1]]
            for key, value in sorted(load_bytes(data).items()):
                own.setdefault(key.rpartition("#")[0], []).append(value.to(device))
        state = {
            part: {name: torch.cat(own[name]).reshape(shape) for name, shape in shapes.items()}
            for (part, shapes), own in zip(index["shapes"].items(), pieces.values(), strict=True)
        }
        return state, index["facts"]
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"{path}: {e}") from e


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """`tensors` flat, in pieces `name#00` of at most `LIMIT` bytes, grouped into files."""
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
    """Down to the disk: an index must never survive a power cut that its shards did not."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _number(path: Path) -> int:
    match = _GENERATION.match(path.name)
    return int(match[1]) if match else 0
