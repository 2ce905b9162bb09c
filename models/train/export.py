"""Put weights into `models/weights/` and name them in its manifest."""

import json
from pathlib import Path

from torch import Tensor

from models import checkpoint
from models.codec import catalogue, zoo
from models.diffusion import presets
from models.errors import WeightsError
from models.train.widen import widened


def codec(
    file: Path,
    quality: int,
    folder: Path = checkpoint.WEIGHTS,
    sizes: tuple[int, int] | None = None,
) -> str:
    """A CompressAI state dict (safetensors, with or without CDF tables) -> its weights id.

    With `sizes`, widened to that many hidden and latent channels. Needs `compressai`, which makes
    the tables.
    """
    state = checkpoint.read(file)[0]
    if "g_a.6.weight" not in state:
        raise WeightsError(f"{file}: no codec's weights")
    if sizes:
        state = {k: v.half() for k, v in widened(state, *sizes).items()}
    tensors = {k: v.contiguous() for k, v in zoo.with_tables(state).items()}
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": "mse"}
    row |= _card(folder / "msh.md", tensors)
    return catalogue.install(tensors, f"msh_q{quality}", folder, row).weights_id


def decoder(file: Path, folder: Path = checkpoint.WEIGHTS) -> str:
    """The averaged weights of a diffusion run (`decoder.safetensors`) -> their weights id.

    They replace the decoder that was installed, and are taken to have learned the latents of the
    codecs that are: others' will be hidden from it. So a new codec is exported first, and the
    decoder follows it.
    """
    tensors, metadata = checkpoint.read(file)
    if "config" not in metadata:
        raise WeightsError(f"{file}: no diffusion decoder; a codec is exported with --quality")
    name = f"decoder_{presets.from_json(metadata['config']).preset}"
    installed = checkpoint.manifest(folder) if (folder / catalogue.MANIFEST).exists() else []
    for entry in installed:
        if entry.kind == "decoder" and entry.name != name:
            (folder / entry.file).unlink(missing_ok=True)
    codecs = [entry.weights_id for entry in installed if entry.kind == "codec"]
    metadata = metadata | {checkpoint.CODECS: json.dumps(codecs)}
    row = {"kind": "decoder", **_card(folder / "compact.md", tensors)}
    return catalogue.install(tensors, name, folder, row, metadata).weights_id


def _card(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The card in the weights' folder, where it names them by their id: else it is of others."""
    of_these = file.exists() and checkpoint.weights_id(tensors) in file.read_text("utf-8")
    return {"card": file.name} if of_these else {}
