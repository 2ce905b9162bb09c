"""Adapt a decoder to a codec that was trained further, without training the decoder.

This is the command `python -m models.train follow`. Further training rotates and scales a codec's
latents slightly. A linear map from the new latents of a position to the old ones is fitted to
photographs by least squares, and multiplied into the weights of the layer that reads the latents.
Later training of the decoder then only has to learn what the map cannot express.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint
from models.errors import WeightsError
from models.files import atomic_write
from models.train import bank
from models.train.encoder import Encoder
from models.train.photos import photographs

RIDGE = 1e-3
"""Ridge term per position in the normal equations; it gives unused channels the weight zero."""
PHOTOGRAPHS = 60
"""Largest number of photographs to which the map is fitted, spread evenly over the folder."""


def adapt(decoder: Path, quality: int, before: Path, after: Path, photos: Path, out: Path) -> float:
    """Adapt `decoder` (of a compact preset) from the codec `before` to `after`; write it to `out`.

    Returns the fraction of the old latents' power that the map does not explain. A codec with fewer
    channels than the decoder reads is treated as if it had been widened. Raises `WeightsError` if a
    file holds something else.
    """
    tensors, metadata = checkpoint.read(decoder)
    if f"conditioner.latents.{quality}.weight" not in tensors:
        raise WeightsError(
            f"{decoder}: reads no latents of quality {quality}; use a decoder of a compact preset"
        )
    cpu = torch.device("cpu")
    old, new = (Encoder(checkpoint.read(file)[0], cpu) for file in (before, after))
    files = photographs(photos, held_out=False)
    files = files[:: -(-len(files) // PHOTOGRAPHS)]
    pictures = (bank.Variant(path, quality, 0).pixels() for path in files)
    m = len(tensors["conditioner.latent_scale"])
    pairs = ((_latents(old, x, m), _latents(new, x, m)) for x in pictures)
    latent_map, unexplained = fit_map(pairs)
    tensors |= folded(tensors, quality, latent_map)
    metadata.pop(checkpoint.CODECS, None)  # lists the previous codecs
    with atomic_write(out) as part:
        save_file(tensors, part, metadata)
    return unexplained


def fit_map(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Fit the affine map from new to old latents; `pairs` are (old, new), each (positions, M).

    Returns the map (M + 1, M), its offset in the last row, and the fraction of the old latents'
    power that it does not explain.
    """
    squares = products = power = torch.zeros((), dtype=torch.float64)
    for old, new in pairs:
        inputs = torch.cat([new, new.new_ones(len(new), 1)], 1)
        squares = squares + inputs.T @ inputs
        products = products + inputs.T @ old
        power = power + old.square().sum()
    ridge = RIDGE * squares[-1, -1] * torch.eye(len(squares), dtype=torch.float64)
    latent_map = torch.linalg.solve(squares + ridge, products)
    residual = power - 2 * (latent_map * products).sum()
    residual = residual + (latent_map * (squares @ latent_map)).sum()
    return latent_map, float(residual / power)


def folded(tensors: dict[str, Tensor], quality: int, latent_map: Tensor) -> dict[str, Tensor]:
    """Return the weight of the decoder's layer for `quality` with `latent_map` folded in."""
    name = f"conditioner.latents.{quality}.weight"
    weight, scale = tensors[name].double()[:, :, 0, 0], tensors["conditioner.latent_scale"].double()
    m = len(scale)
    of_latents = weight[:, :m] * scale
    # the last input is 1 where latents are visible and 0 where they are hidden
    visible = weight[:, -1] + of_latents @ latent_map[m]
    parts = [of_latents @ latent_map[:m].T / scale, weight[:, m:-1], visible[:, None]]
    new_weight = torch.cat(parts, 1)[:, :, None, None]
    return {name: new_weight.to(tensors[name].dtype).contiguous()}


def _latents(codec: Encoder, x: Tensor, m: int) -> Tensor:
    """Latents of a picture padded with zeros to `m` channels, (positions, m) float64."""
    y_hat = codec(x)["y_hat"].flatten(1).T.double()
    return torch.nn.functional.pad(y_hat, (0, m - y_hat.shape[1]))
