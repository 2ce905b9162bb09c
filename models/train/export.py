"""Install weights into `models/weights/` and list them in its manifest."""

import json
from pathlib import Path

from torch import Tensor

from models import checkpoint
from models.codec import catalogue, zoo
from models.diffusion import presets
from models.errors import WeightsError
from models.train.widen import widen


def codec(
    file: Path,
    quality: int,
    folder: Path = checkpoint.WEIGHTS,
    sizes: tuple[int, int] | None = None,
) -> str:
    """Install a CompressAI state dict (safetensors, CDF tables optional); return its weights id.

    With `sizes`, the codec is widened to that many hidden and latent channels. Raises
    `WeightsError` if `file` holds no codec.
    """
    state = checkpoint.read(file)[0]
    if "g_a.6.weight" not in state:
        raise WeightsError(f"{file}: not a codec; a decoder is exported without --quality")
    if sizes:
        state = {k: v.half() for k, v in widen(state, *sizes).items()}
    tensors = {k: v.contiguous() for k, v in zoo.with_tables(state).items()}
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": "mse"}
    row |= _card(folder / "msh.md", tensors)
    return catalogue.install(tensors, f"msh_q{quality}", folder, row).weights_id


def decoder(file: Path, folder: Path = checkpoint.WEIGHTS, steps: int = 0) -> str:
    """Install the averaged weights of a diffusion run (`decoder.safetensors`); return their id.

    They replace the installed general decoder or, with `steps`, the decoder that draws in this
    number of steps at beta 1. The file records the codecs that are installed now as those that the
    decoder was trained for; latents of other codecs are hidden from it. So export a new codec
    before its decoder. Raises `WeightsError` if `file` holds no decoder.
    """
    tensors, metadata = checkpoint.read(file)
    if "config" not in metadata:
        raise WeightsError(f"{file}: not a diffusion decoder; a codec is exported with --quality")
    preset = presets.from_json(metadata["config"]).preset
    name = f"decoder_{preset}_{steps}" if steps else f"decoder_{preset}"
    installed = checkpoint.manifest(folder) if (folder / catalogue.MANIFEST).exists() else []
    codecs = [entry.weights_id for entry in installed if entry.kind == "codec"]
    metadata = metadata | {checkpoint.CODECS: json.dumps(codecs)}
    row: dict[str, str | int] = {"kind": "decoder", "steps": steps}
    row |= _card(folder / "compact.md", tensors)
    weights_id = catalogue.install(tensors, name, folder, row, metadata).weights_id
    for entry in installed:
        if entry.kind == "decoder" and entry.steps == steps and entry.name != name:
            (folder / entry.file).unlink(missing_ok=True)
    return weights_id


def _card(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the manifest's field `card`, if that model card contains the id of these weights."""
    matches = file.exists() and checkpoint.weights_id(tensors) in file.read_text("utf-8")
    return {"card": file.name} if matches else {}
