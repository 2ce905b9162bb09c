"""Weights on disk: safetensors named by a manifest, checked by digest, identified by content."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from models.errors import WeightsError

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped weights; `manifest.toml` there names every file."""
CODECS = "codecs"
"""In the metadata of a diffusion decoder's file: a JSON list of weights ids."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the manifest. `quality` and `metric` are empty for the diffusion decoder."""

    kind: str
    name: str
    file: str
    sha256: str
    weights_id: str
    quality: int = 0
    metric: str = ""
    source: str = ""  # what it was imported from
    card: str = ""  # file beside it that tells of its making


def weights_id(tensors: Mapping[str, Tensor]) -> str:
    """First 8 bytes, in hex, of SHA-256 over (name, dtype, shape, bytes) of the sorted tensors."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def manifest(folder: Path = WEIGHTS) -> list[Entry]:
    """All entries of the folder's `manifest.toml`; `WeightsError` where it is missing or wrong."""
    path = folder / "manifest.toml"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        entries = [Entry(**row) for row in table["weights"]]
        for e in entries:
            for file in (e.file, e.card or e.file):
                if Path(file).name != file:
                    raise ValueError(f"{file!r} lies outside its folder")
        return entries
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{path}: {e}") from e


def load(entry: Entry, folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of an entry, as stored; `WeightsError` where the file is missing or altered."""
    return load_with_metadata(entry, folder)[0]


def load_with_metadata(
    entry: Entry, folder: Path = WEIGHTS
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an entry; `WeightsError` where the file is missing or altered."""
    path = folder / entry.file
    data = _bytes(path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise WeightsError(f"{path}: not the file that the manifest names")
    tensors, metadata = _parsed(data, path)
    if weights_id(tensors) != entry.weights_id:
        raise WeightsError(f"{path}: its weights id is not the one that the manifest names")
    return tensors, metadata


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that no manifest names; `WeightsError`."""
    return _parsed(_bytes(path), path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}") from e


def _parsed(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = load_bytes(data)
    except SafetensorError as e:
        raise WeightsError(f"{path}: {e}") from e
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})
