"""The conditional U-Net of the `compact` preset: residual diffusion over a shared latent space.

`Conditioner` (the paper's `g_s,dec`) runs once per picture, `Denoiser` once per step. Neither has
attention nor a norm over space, so that what a pixel becomes depends on a bounded neighbourhood.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = tuple[Tensor, Tensor, Tensor]
"""Condition at 1/4, 1/8 and 1/16 of the picture's size, of the denoiser's widths."""


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Sizes of a network. `widths` are channels at 1/4, 1/8, 1/16; `latents` is the codec's M."""

    latents: int = 192
    widths: tuple[int, int, int] = (96, 128, 160)
    embedding: int = 128
    qualities: int = 8

    @property
    def halo(self) -> int:
        """Pixels that a denoiser's output depends on beyond its own position, on each side."""
        return 4 * (1 + 2 + 2 * 2 + 1) + 8 * (2 + 2) + 16 * 2


class RMSNorm(nn.Module):
    """x / rms over channels, per pixel, times a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain[None, :, None, None]
        return x * (torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * gain)


class Block(nn.Module):
    """Residual: two 3×3 convolutions, the first modulated by the embedding."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(channels), RMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(torch.addcmul(shift, self.norm1(x), 1 + scale)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(h)))
        return out


class Down(nn.Module):
    """(B, i, H, W) -> (B, o, H/2, W/2)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pixel_unshuffle(x, 2))
        return h


class Up(nn.Module):
    """(B, i, H, W) -> (B, o, 2H, 2W)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, 4 * o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = F.pixel_shuffle(self.conv(x), 2)
        return h


class Conditioner(nn.Module):
    """`y_hat`, its bit map and `x_hat` -> maps that every denoiser step reads."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        w4, w8, w16 = config.widths
        e = config.embedding
        self.latent_scale: Tensor
        self.register_buffer("latent_scale", torch.ones(config.latents))
        self.latents = nn.Conv2d(config.latents + 2, w16, 1)
        self.picture = nn.Conv2d(48, w4, 3, padding=1)
        self.down8, self.down16 = Down(w4, w8), Down(w8, w16)
        self.up8, self.up4 = Up(w16, w8), Up(w8, w4)
        self.blocks16 = nn.ModuleList(Block(w16, e) for _ in range(2))
        self.blocks8 = nn.ModuleList(Block(w8, e) for _ in range(2))
        self.blocks4 = nn.ModuleList(Block(w4, e) for _ in range(2))
        self.quality = nn.Embedding(config.qualities + 1, e)
        self.beta = nn.Parameter(torch.zeros(e))

    def forward(
        self,
        x_hat: Tensor,
        y_hat: Tensor,
        bits: Tensor,
        quality: Tensor,
        beta: Tensor,
        keep: Tensor,
    ) -> Maps:
        """`x_hat` (B, 3, H, W) in [0, 1], `y_hat` (B, M, H/16, W/16), `bits` (B, 1, H/16, W/16).

        `quality`, `beta`, `keep` (B,): `keep` 0 hides `y_hat` (foreign codecs, autoguidance).
        """
        emb = F.silu(self.quality(quality) + beta[:, None] * self.beta)
        shown = keep[:, None, None, None]
        scale = self.latent_scale[None, :, None, None]
        spent = torch.log1p(bits) / 4
        latents = torch.cat([y_hat * scale * shown, spent, shown.expand_as(bits)], 1)
        h4 = self.picture(F.pixel_unshuffle(x_hat * 2 - 1, 4))  # (B, w4, H/4, W/4)
        h8 = self.down8(h4)  # (B, w8, H/8, W/8)
        h16 = self.down16(h8) + self.latents(latents)  # (B, w16, H/16, W/16)
        for block in self.blocks16:
            h16 = block(h16, emb)
        h8 = h8 + self.up8(h16)
        for block in self.blocks8:
            h8 = block(h8, emb)
        h4 = h4 + self.up4(h8)
        for block in self.blocks4:
            h4 = block(h4, emb)
        return h4, h8, h16


class Denoiser(nn.Module):
    """x_t and the condition -> v."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        w4, w8, w16 = config.widths
        e = config.embedding
        self.frequencies = e // 2
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.quality = nn.Embedding(config.qualities + 1, e)
        self.beta = nn.Parameter(torch.zeros(e))
        self.inward = nn.Conv2d(48, w4, 3, padding=1)
        self.down8, self.down16 = Down(w4, w8), Down(w8, w16)
        self.up8, self.up4 = Up(w16, w8), Up(w8, w4)
        self.first4, self.first8, self.middle = Block(w4, e), Block(w8, e), Block(w16, e)
        self.last8 = Block(w8, e)
        self.last4 = nn.ModuleList(Block(w4, e) for _ in range(2))
        self.norm = RMSNorm(w4)
        self.outward = nn.Conv2d(w4, 48, 3, padding=1)
        with torch.no_grad():
            self.outward.weight.mul_(0.1)

    def forward(self, x_t: Tensor, t: Tensor, maps: Maps, quality: Tensor, beta: Tensor) -> Tensor:
        """`x_t` (B, 3, H, W), sides multiples of 16; `t`, `quality`, `beta` (B,) -> v."""
        octaves = torch.exp2(torch.linspace(-1, 5, self.frequencies, device=t.device))
        angles = math.pi * t[:, None] * octaves
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        emb = F.silu(self.time(waves) + self.quality(quality) + beta[:, None] * self.beta)
        c4, c8, c16 = maps
        h4 = self.first4(self.inward(F.pixel_unshuffle(x_t, 4)) + c4, emb)  # (B, w4, H/4, W/4)
        h8 = self.first8(self.down8(h4) + c8, emb)  # (B, w8, H/8, W/8)
        h16 = self.middle(self.down16(h8) + c16, emb)  # (B, w16, H/16, W/16)
        h8 = self.last8(h8 + self.up8(h16), emb)
        h4 = h4 + self.up4(h8)
        for block in self.last4:
            h4 = block(h4, emb)
        return F.pixel_shuffle(self.outward(F.silu(self.norm(h4))), 4)


class UNet(nn.Module):
    """Conditioner and denoiser of one preset.

    `scales` (qualities + 1,) is the residual's standard deviation per quality: x0 is in its units.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(config.qualities + 1))
        self.conditioner = Conditioner(config)
        self.denoiser = Denoiser(config)


def high_pass(r: Tensor) -> Tensor:
    """`r` (B, C, H, W), sides multiples of 16 -> `r` without its lowest band.

    The band is what block means of 16 pixels, blurred once and interpolated back, show. It belongs
    to the codec's picture: a decoder that leaves it alone cannot shift colours.
    """
    coarse = F.avg_pool2d(r, 16)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=r.device, dtype=r.dtype)
    weight = (kernel[:, None] * kernel)[None, None].expand(r.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), weight, groups=r.shape[1])
    band = F.interpolate(blurred, size=r.shape[2:], mode="bilinear", align_corners=False)
    return r - band
