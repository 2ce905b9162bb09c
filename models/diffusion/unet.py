"""Conditional U-Net, in two forms: `compact` and `paper`.

The conditioner turns a picture's latents into feature maps once; the denoiser reads these maps at
every step. `paper` is the network of Mari & Milani: g_s,dec and the U-Net of Ho et al. as modified
by Nichol & Dhariwal. `compact` has neither attention nor norms over space, so its receptive field
is bounded and a large picture can be computed in windows.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.blocks import (
    Block,
    NearestUp,
    PixelRefinement,
    ShuffleDown,
    ShuffleUp,
    as_module_list,
    norm_layer,
    zero_init,
)
from models.diffusion.conditioner import Conditioner, LatentSynthesis, Maps
from models.diffusion.presets import UNetConfig, from_json
from models.errors import WeightsError


class Denoiser(nn.Module):
    """Predict v or epsilon from x_t and the feature maps.

    In `paper` every block has a skip connection; skip connections and feature maps are concatenated
    with the features. In `compact` every level has one skip connection, and both are added. The
    finest `unmapped` levels get no feature map.
    """

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        e, fine = c.embedding, c.widths[0]
        self.patch, self.concat = c.patch, c.preset == "paper"
        self.unmapped = len(c.widths) - len(c.condition) if not self.concat else 0
        self.frequencies: Tensor
        self.register_buffer("frequencies", _frequencies(c.preset), persistent=False)
        waves = 2 * len(self.frequencies)
        self.time = nn.Sequential(nn.Linear(waves, e), nn.SiLU(), nn.Linear(e, e))
        self.quality = nn.Embedding(c.qualities + 1, e) if c.qualities else None
        self.beta = nn.Parameter(torch.zeros(e)) if c.qualities else None
        self.inward = nn.Conv2d(3 * c.patch**2, fine, 3, padding=1)
        self.enter, self.leave = nn.ModuleList([nn.Identity()]), nn.ModuleList([nn.Identity()])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [self._add_encoder_level(level, c) for level in range(len(c.widths))]
        self.middle = nn.ModuleList()
        if self.concat:
            coarse = c.widths[-1]
            self.middle.extend(Block(coarse, coarse, c, attention) for attention in (True, False))
        for level in range(len(c.widths)):
            self._add_decoder_level(level, skips[level], c)
        self.norm = norm_layer(c.preset, fine)
        out = (6 if c.learned_variance else 3) * c.patch**2
        self.outward = zero_init(nn.Conv2d(fine, out, 3, padding=1))
        self.smooth = PixelRefinement(fine, c.patch, c.smooth) if c.smooth else None

    def _add_encoder_level(self, level: int, c: UNetConfig) -> list[int]:
        """Add the layers of a level; return the channels of its skip connections."""
        width, before = c.widths[level], c.widths[max(level - 1, 0)]
        if level:
            down = nn.Conv2d(before, before, 3, 2, 1) if self.concat else ShuffleDown(before, width)
            self.enter.append(down)
        first = width
        if self.concat:
            first = before + (c.condition[level] if level < len(c.condition) else 0)
        inputs = [first] + [width] * (c.down[level] - 1)
        attends = level in c.attention
        self.down.append(nn.ModuleList(Block(i, width, c, attends) for i in inputs))
        return [before] + [width] * c.down[level] if self.concat else [0]

    def _add_decoder_level(self, level: int, skips: list[int], c: UNetConfig) -> None:
        """Add the layers of a level; `skips` are the channels of its skip connections."""
        width, coarser = c.widths[level], c.widths[min(level + 1, len(c.widths) - 1)]
        inputs = [width] * c.up[level]
        if self.concat:
            inputs[0] = coarser
            inputs = [i + k for i, k in zip(inputs, reversed(skips), strict=True)]
        attends = level in c.attention
        self.up.append(nn.ModuleList(Block(i, width, c, attends) for i in inputs))
        if level:
            finer = c.widths[level - 1]
            self.leave.append(NearestUp(width) if self.concat else ShuffleUp(width, finer))

    def forward(self, x_t: Tensor, t: Tensor, maps: Maps, quality: Tensor, beta: Tensor) -> Tensor:
        """Predict v or epsilon (B, 3, H, W), or (B, 6, H, W) if the variance is learned too.

        `x_t` is (B, 3, H, W), its sides multiples of 16; `t`, `quality` and `beta` are (B,).
        """
        emb = self._embed(t, quality, beta)
        h = self.inward(F.pixel_unshuffle(x_t, self.patch))
        skips: list[list[Tensor]] = []
        for level, enter in enumerate(self.enter):
            h = enter(h)
            outputs = [h]
            if self.unmapped <= level < self.unmapped + len(maps):
                h = self._join(h, maps[level - self.unmapped])
            for block in as_module_list(self.down[level]):
                h = block(h, emb)
                outputs.append(h)
            skips.append(outputs if self.concat else outputs[-1:])
        for block in self.middle:
            h = block(h, emb)
        for level in reversed(range(len(self.up))):
            for block in as_module_list(self.up[level]):
                if skips[level]:
                    h = self._join(h, skips[level].pop())
                h = block(h, emb)
            h = self.leave[level](h)
        h = F.silu(self.norm(h))
        out = F.pixel_shuffle(self.outward(h), self.patch)
        return self.smooth(out, h, x_t) if self.smooth is not None else out

    def _embed(self, t: Tensor, quality: Tensor, beta: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        emb: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        if self.quality is not None and self.beta is not None:
            emb = emb + self.quality(quality) + beta[:, None] * self.beta
        return F.silu(emb)

    def _join(self, h: Tensor, other: Tensor) -> Tensor:
        return torch.cat([h, other], 1) if self.concat else h + other


class UNet(nn.Module):
    """Conditioner and denoiser of one configuration.

    `scales` (qualities + 1,) holds the residual's standard deviation for each quality, by which a
    residual is divided before diffusion. It is 1 for qualities that were not trained.
    """

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        self.config: UNetConfig = c
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(c.qualities + 1))
        self.conditioner = LatentSynthesis(c) if c.preset == "paper" else Conditioner(c)
        self.denoiser = Denoiser(c)

    def trained_qualities(self) -> list[int]:
        """Return the qualities that were trained, ascending."""
        return [q for q, scale in enumerate(self.scales.tolist()) if q and scale != 1]


def read_network(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> UNet:
    """Build the network of a decoder's file. Raises `WeightsError` if it holds none."""
    try:
        net = UNet(from_json(metadata["config"]))
        net.load_state_dict({k: v.float() for k, v in tensors.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise WeightsError(f"{file}: not a diffusion decoder: {e}") from e
    return net


def _frequencies(preset: str) -> Tensor:
    """Angular frequencies (64,) of the embedding of t in [0, 1].

    `paper` uses those of Ho et al. for the index 3999 t; `compact` has 1/4 to 16 periods.
    """
    i = torch.arange(64, dtype=torch.float64)
    if preset == "paper":
        return (3999 * torch.exp(-math.log(10000) * i / 64)).float()
    return (math.pi * 2 ** (-1 + 6 * i / 63)).float()
