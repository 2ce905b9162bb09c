"""Weights files in safetensors format: listed in a manifest with their digests and weights ids."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from models.errors import WeightsError

if TYPE_CHECKING:  # torch takes seconds to load, and manifests are read without it
    from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the shipped weights. Its `manifest.toml` lists every file."""
CODECS = "codecs"
"""Metadata key in a diffusion decoder's file: a JSON list of the weights ids of the codecs whose
latents it was trained with."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in a manifest. `quality` is 0 and `metric` empty for diffusion decoders."""

    kind: str
    name: str
    file: str
    sha256: str
    weights_id: str
    quality: int = 0
    metric: str = ""
    source: str = ""  # the file or URL that it was imported from
    card: str = ""  # name of the model card in the same folder
    model: str = ""  # a codec's architecture; empty for mbt2018-mean and for diffusion decoders
    steps: int = 0  # of a diffusion decoder: the number of steps it serves at beta 1; 0: any


def weights_id(tensors: "Mapping[str, Tensor]") -> str:
    """Return 16 hex digits that identify the tensors, independent of their file.

    They are the first 8 bytes of a SHA-256 over the name, dtype, shape and bytes of each tensor, in
    the order of the names.
    """
    import torch

    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def manifest(folder: Path = WEIGHTS) -> list[Entry]:
    """Read `manifest.toml` in `folder`. Raises `WeightsError` if it is missing or invalid."""
    path = folder / "manifest.toml"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        entries = [Entry(**row) for row in table["weights"]]
        for e in entries:
            for file in (e.file, e.card or e.file):
                if Path(file).name != file:
                    raise ValueError(f"{file!r} lies outside the manifest's folder")
        return entries
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}") from e
    except KeyError as e:
        raise WeightsError(f"{path}: the table {e} is missing; import the weights again") from e
    except (ValueError, TypeError) as e:
        raise WeightsError(f"{path}: not a valid manifest: {e}; import the weights again") from e


def decoder_entries(folder: Path = WEIGHTS) -> dict[int, Entry]:
    """The diffusion decoders in a manifest, by their `steps`, for `tiers.decoder_for`.

    Raises `WeightsError` if there is no general one, whose `steps` are 0.
    """
    entries = {entry.steps: entry for entry in manifest(folder) if entry.kind == "decoder"}
    if 0 not in entries:
        raise WeightsError(
            f"{folder / 'manifest.toml'}: names no general diffusion decoder; reinstall "
            "Afterimage, or install one with `python -m models.train export`"
        )
    return entries


def load(entry: Entry, folder: Path = WEIGHTS) -> "dict[str, Tensor]":
    """Load and verify an entry's tensors. Raises as `load_with_metadata` does."""
    return load_with_metadata(entry, folder)[0]


def load_with_metadata(
    entry: Entry, folder: Path = WEIGHTS
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Load and verify an entry's tensors, in their stored dtypes, and the file's metadata.

    Raises `WeightsError` if the file is missing or is not the one in the manifest.
    """
    path = folder / entry.file
    data = _read_bytes(path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise WeightsError(
            f"{path}: not the file in the manifest (SHA-256 differs); install or import it again"
        )
    tensors, metadata = _parse(data, path)
    if (actual := weights_id(tensors)) != entry.weights_id:
        raise WeightsError(
            f"{path}: its weights id is {actual}; the manifest lists {entry.weights_id}; "
            "install or import it again"
        )
    return tensors, metadata


def read(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Read tensors and metadata of a safetensors file without a manifest.

    Raises `WeightsError` if the file is missing or damaged.
    """
    return _parse(_read_bytes(path), path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}") from e


def _parse(data: bytes, path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    from safetensors.torch import load as load_tensors

    try:
        tensors = load_tensors(data)
    except SafetensorError as e:
        raise WeightsError(f"{path}: {e}") from e
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})
