"""Conditioning of the U-Net: feature maps of a picture's latents, computed once for all steps."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.blocks import Block, ShuffleDown, ShuffleUp, as_module_list
from models.diffusion.presets import UNetConfig

Maps = tuple[Tensor, ...]
"""Feature maps, finest first: (B, C, H/s, W/s) for the strides s of `UNetConfig.map_strides`."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Input of a conditioner: a batch of pictures whose sides are multiples of 16."""

    x_hat: Tensor  # (B, 3, H, W) in [0, 1], the codec's picture
    y_hat: Tensor  # (B, M, H/16, W/16)
    bits: Tensor  # (B, 1, H/16, W/16), bits spent on each latent position
    quality: Tensor  # (B,) int64
    beta: Tensor  # (B,)
    latents_visible: Tensor  # (B,): 1, or 0 to hide `y_hat` (for unknown codecs and autoguidance)


class Conditioner(nn.Module):
    """Conditioner of the compact presets: `x_hat`, `y_hat` and its bit map -> feature maps."""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        widths, e = c.condition, c.embedding
        self.latent_scale: Tensor
        self.register_buffer("latent_scale", torch.ones(c.latents))
        self.latents = PerQuality(c.qualities, c.latents + 2, widths[-1])
        self.picture = nn.Conv2d(48, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ShuffleDown(i, o) for i, o in pairwise(widths))
        self.up = nn.ModuleList(ShuffleUp(o, i) for i, o in pairwise(widths))
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(w, w, c) for _ in range(c.depth)) for w in widths
        )
        self.quality = nn.Embedding(c.qualities + 1, e)
        self.beta = nn.Parameter(torch.zeros(e))

    def forward(self, condition: Condition) -> Maps:
        """Maps at 1/4, 1/8 and 1/16 of the picture, with `UNetConfig.condition` channels."""
        quality = condition.quality
        emb = F.silu(self.quality(quality) + condition.beta[:, None] * self.beta)
        visible = condition.latents_visible[:, None, None, None]
        y_hat = condition.y_hat * self.latent_scale[None, :, None, None] * visible
        bits = torch.log1p(condition.bits) / 4
        latents = torch.cat([y_hat, bits, visible.expand_as(bits)], 1)
        maps = [self.picture(F.pixel_unshuffle(condition.x_hat * 2 - 1, 4))]
        for down in self.down:
            maps.append(down(maps[-1]))
        maps[-1] = maps[-1] + _in_float32(self.latents, latents, quality)
        for i in reversed(range(len(maps))):
            if i + 1 < len(maps):
                maps[i] = maps[i] + self.up[i](maps[i + 1])
            for block in as_module_list(self.blocks[i]):
                maps[i] = block(maps[i], emb)
        return tuple(maps)


class PerQuality(nn.ModuleList):
    """One 1×1 convolution per quality, because the channels of each codec mean something else.

    Index 0 is the convolution for an unknown quality.
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
    """Conditioner of the paper (its g_s,dec): `y_hat` -> feature maps at 1/1, 1/2, 1/4 and 1/8."""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        widths = (c.latents, *reversed(c.condition))
        self.inner = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(i, i, 3, padding=1) for _ in range(2)) for i in widths[:-1]
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 3, 2, 1, output_padding=1) for i, o in pairwise(widths)
        )

    def forward(self, condition: Condition) -> Maps:
        """Maps with `UNetConfig.condition` channels; reads only `condition.y_hat`."""
        maps = [_in_float32(self._stage, condition.y_hat, 0)]
        for i in range(1, len(self.up)):
            maps.append(self._stage(maps[-1], i))
        return tuple(reversed(maps))

    def _stage(self, h: Tensor, i: int) -> Tensor:
        first, second = as_module_list(self.inner[i])
        h = F.relu(h + second(F.relu(first(h))))
        return F.relu(self.up[i](h))


def _in_float32(layer: Callable[..., Tensor], y_hat: Tensor, *arguments: int | Tensor) -> Tensor:
    """Call `layer` on latents in float32, even under autocast.

    Latents reach ±60, where bfloat16 values are a quarter of the quantiser's step apart.
    """
    with torch.autocast(y_hat.device.type, enabled=False):
        return layer(y_hat.float(), *arguments)
