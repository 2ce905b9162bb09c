"""From latents to maps: what a picture's condition is, computed once for all steps."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.blocks import Block, Fold, Unfold, blocks
from models.diffusion.presets import UNetConfig

Maps = tuple[Tensor, ...]
"""Condition, finest first: (B, C, H/s, W/s) for the strides s of `UNetConfig.map_strides`."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What the maps are made of: a batch of pictures, sides multiples of 16."""

    x_hat: Tensor  # (B, 3, H, W) in [0, 1], the codec's picture
    y_hat: Tensor  # (B, M, H/16, W/16)
    bits: Tensor  # (B, 1, H/16, W/16), what each position cost
    quality: Tensor  # (B,) int64
    beta: Tensor  # (B,)
    keep: Tensor  # (B,): 0 hides `y_hat` (foreign codecs, autoguidance)


class Conditioner(nn.Module):
    """The compact preset's: `y_hat`, its bit map and `x_hat` -> maps at 1/4, 1/8, 1/16."""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        widths, e = c.condition, c.embedding
        self.latent_scale: Tensor
        self.register_buffer("latent_scale", torch.ones(c.latents))
        self.latents = PerQuality(c.qualities, c.latents + 2, widths[-1])
        self.picture = nn.Conv2d(48, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Fold(i, o) for i, o in pairwise(widths))
        self.up = nn.ModuleList(Unfold(o, i) for i, o in pairwise(widths))
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(w, w, c) for _ in range(c.depth)) for w in widths
        )
        self.quality = nn.Embedding(c.qualities + 1, e)
        self.beta = nn.Parameter(torch.zeros(e))

    def forward(self, given: Condition) -> Maps:
        """`given` -> maps of widths `condition`."""
        emb = F.silu(self.quality(given.quality) + given.beta[:, None] * self.beta)
        shown = given.keep[:, None, None, None]
        y_hat = given.y_hat * self.latent_scale[None, :, None, None] * shown
        spent = torch.log1p(given.bits) / 4
        latents = torch.cat([y_hat, spent, shown.expand_as(spent)], 1)
        maps = [self.picture(F.pixel_unshuffle(given.x_hat * 2 - 1, 4))]
        for down in self.down:
            maps.append(down(maps[-1]))
        maps[-1] = maps[-1] + _exact(self.latents, latents, given.quality)
        for i in reversed(range(len(maps))):
            if i + 1 < len(maps):
                maps[i] = maps[i] + self.up[i](maps[i + 1])
            for block in blocks(self.blocks[i]):
                maps[i] = block(maps[i], emb)
        return tuple(maps)


class PerQuality(nn.ModuleList):
    """A 1×1 convolution for each quality: each codec's latents are in a basis of their own.

    Quality 0, of none, has one too.
    """

    def __init__(self, qualities: int, i: int, o: int) -> None:
        super().__init__(nn.Conv2d(i, o, 1) for _ in range(qualities + 1))

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """`x` (B, I, h, w), `quality` (B,) int64 -> (B, O, h, w)."""
        convolutions = [cast(nn.Conv2d, layer) for layer in self]
        weight = torch.stack([c.weight[:, :, 0, 0] for c in convolutions])[quality]
        bias = torch.stack([cast(Tensor, c.bias) for c in convolutions])[quality]
        out = torch.baddbmm(bias[:, :, None], weight, x.flatten(2))
        return out.view(*out.shape[:2], *x.shape[2:])


class LatentSynthesis(nn.Module):
    """The paper's g_s,dec: `y_hat` -> maps at 1/1, 1/2, 1/4, 1/8."""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        widths = (c.latents, *reversed(c.condition))
        self.inner = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(i, i, 3, padding=1) for _ in range(2)) for i in widths[:-1]
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 3, 2, 1, output_padding=1) for i, o in pairwise(widths)
        )

    def forward(self, given: Condition) -> Maps:
        """`given` -> maps of widths `condition`; only its `y_hat` is read."""
        maps = [_exact(self._stage, given.y_hat, 0)]
        for i in range(1, len(self.up)):
            maps.append(self._stage(maps[-1], i))
        return tuple(reversed(maps))

    def _stage(self, h: Tensor, i: int) -> Tensor:
        first, second = blocks(self.inner[i])
        h = F.relu(h + second(F.relu(first(h))))
        return F.relu(self.up[i](h))


def _exact(layer: Callable[..., Tensor], y_hat: Tensor, *more: int | Tensor) -> Tensor:
    """What reads latents does so in float32, also under autocast: they reach ±60, where bfloat16's
    spacing is a quarter of the quantiser's step."""
    with torch.autocast(y_hat.device.type, enabled=False):
        return layer(y_hat.float(), *more)
