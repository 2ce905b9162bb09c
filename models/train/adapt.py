"""A decoder follows a codec that was trained on, before it learns anything anew.

Training moves a codec's latents: they turn, and scale, a little. The linear map from the new
latents of a position to the old ones, by least squares over photographs, is folded into the layer
that reads them. What that leaves over is for training to learn.
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
"""Squared latents added to the normal equations, per position: idle channels stay unread."""
PHOTOGRAPHS = 60
"""How many the map is fitted to, spread over a folder."""


def follow(
    decoder: Path, quality: int, before: Path, after: Path, photos: Path, out: Path
) -> float:
    """Write `decoder`, of a compact preset, for the codec `after` in place of `before`, to `out`.

    Returns the part of the old latents' power that the map leaves over. A codec with fewer channels
    than the decoder reads counts as one that was widened. `WeightsError` where a file is none of
    what it is called.
    """
    tensors, metadata = checkpoint.read(decoder)
    if f"conditioner.latents.{quality}.weight" not in tensors:
        raise WeightsError(f"{decoder}: reads no latents of quality {quality}")
    cpu = torch.device("cpu")
    old, new = (Encoder(checkpoint.read(file)[0], cpu) for file in (before, after))
    files = photographs(photos, held_out=False)
    files = files[:: -(-len(files) // PHOTOGRAPHS)]
    pictures = (bank.Variant(path, quality, 0).pixels() for path in files)
    m = len(tensors["conditioner.latent_scale"])
    pairs = ((_latents(old, x, m), _latents(new, x, m)) for x in pictures)
    change, left = fit(pairs)
    tensors |= turned(tensors, quality, change)
    metadata.pop(checkpoint.CODECS, None)  # of those before
    with atomic_write(out) as part:
        save_file(tensors, part, metadata)
    return left


def fit(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Old and new latents, each (positions, M) -> the map (M + 1, M) with its offset as last row.

    And the part of the old latents' power that it leaves over.
    """
    squares = products = power = torch.zeros((), dtype=torch.float64)
    for old, new in pairs:
        known = torch.cat([new, new.new_ones(len(new), 1)], 1)
        squares = squares + known.T @ known
        products = products + known.T @ old
        power = power + old.square().sum()
    ridge = RIDGE * squares[-1, -1] * torch.eye(len(squares), dtype=torch.float64)
    change = torch.linalg.solve(squares + ridge, products)
    left = power - 2 * (change * products).sum() + (change * (squares @ change)).sum()
    return change, float(left / power)


def turned(tensors: dict[str, Tensor], quality: int, change: Tensor) -> dict[str, Tensor]:
    """The weight of a decoder's layer for this quality, behind the map `change`."""
    name = f"conditioner.latents.{quality}.weight"
    weight, scale = tensors[name].double()[:, :, 0, 0], tensors["conditioner.latent_scale"].double()
    m = len(scale)
    reads = weight[:, :m] * scale
    offset = weight[:, -1] + reads @ change[m]  # beside the flag that latents are shown
    made = torch.cat([reads @ change[:m].T / scale, weight[:, m:-1], offset[:, None]], 1)
    return {name: made[:, :, None, None].to(tensors[name].dtype).contiguous()}


def _latents(codec: Encoder, x: Tensor, m: int) -> Tensor:
    """(positions, m) in double precision."""
    y_hat = codec(x)["y_hat"].flatten(1).T.double()
    return torch.nn.functional.pad(y_hat, (0, m - y_hat.shape[1]))
