"""Put weights into `models/weights/` and name them in its manifest."""

import os
import tomllib
from hashlib import sha256
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint, zoo


def codec(file: Path, quality: int, folder: Path = checkpoint.WEIGHTS) -> str:
    """A CompressAI state dict (safetensors, with or without CDF tables) -> its weights id.

    Needs `compressai`, which makes the tables.
    """
    tensors = {k: v.contiguous() for k, v in zoo.with_tables(_read(file)[0]).items()}
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": "mse"}
    return _install(tensors, None, f"msh_q{quality}", row, folder)


def decoder(file: Path, folder: Path = checkpoint.WEIGHTS) -> str:
    """The averaged weights of a diffusion run (`decoder.safetensors`) -> their weights id."""
    return _install(*_read(file), "decoder_compact", {"kind": "decoder"}, folder)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


def _install(
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    name: str,
    row: dict[str, str | int],
    folder: Path,
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.safetensors", folder / f"{name}.part"
    save_file(tensors, part, metadata)
    part.chmod(0o644)
    os.replace(part, path)
    identity = checkpoint.weights_id(tensors)
    digest = sha256(path.read_bytes()).hexdigest()
    row = {"name": name, "file": path.name, "sha256": digest, "weights_id": identity, **row}
    manifest = folder / "manifest.toml"
    rows = tomllib.loads(manifest.read_text())["weights"] if manifest.exists() else []
    rows = sorted([*(r for r in rows if r["name"] != name), row], key=lambda r: str(r["name"]))
    texts = ("\n".join(f"{k} = {_toml(v)}" for k, v in r.items()) for r in rows)
    manifest.write_text("\n\n".join(f"[[weights]]\n{text}" for text in texts) + "\n")
    return identity


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
