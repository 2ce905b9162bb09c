"""What the U-Nets are built of."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.presets import UNetConfig

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


class RMSNorm(nn.Module):
    """x / rms over channels, per pixel, times a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        # one pass for the norm, one for the product: on a CPU these passes are a third of a step
        power = torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]
        return x * torch.rsqrt(power + 1e-5) * self.gain[None, :, None, None]


class Attention(nn.Module):
    """Self-attention over all positions, four heads, residual."""

    HEADS = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm("paper", channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeros(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.HEADS, c // self.HEADS, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, H W, C / heads)
        seen = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(seen.transpose(2, 3).reshape(b, c, h, w))
        return out


class Block(nn.Module):
    """Residual: two 3×3 convolutions; scale and shift from the embedding follow one of the norms.

    That is the first norm for `compact`, the second for `paper`.
    """

    def __init__(self, i: int, o: int, c: UNetConfig, attention: bool = False) -> None:
        super().__init__()
        self.late = c.preset == "paper"
        self.norm1, self.norm2 = norm(c.preset, i), norm(c.preset, o)
        self.conv1 = nn.Conv2d(i, o, 3, padding=1)
        self.conv2 = zeros(nn.Conv2d(o, o, 3, padding=1))
        self.modulation = nn.Linear(c.embedding, 2 * (o if self.late else i))
        if not self.late:
            zeros(self.modulation)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        self.attention = Attention(o) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, 1)
        h = self.norm1(x)
        if not self.late:
            h = torch.addcmul(shift, h, 1 + scale)
        h = self.norm2(self.conv1(F.silu(h)))
        if self.late:
            h = torch.addcmul(shift, h, 1 + scale)
        out: Tensor = self.attention(self.skip(x) + self.conv2(F.silu(h)))
        return out


class Fold(nn.Module):
    """(B, i, H, W) -> (B, o, H/2, W/2): pixel unshuffle and a 1×1 convolution."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pixel_unshuffle(x, 2))
        return h


class Unfold(nn.Module):
    """(B, i, H, W) -> (B, o, 2H, 2W): a 1×1 convolution and pixel shuffle."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, 4 * o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = F.pixel_shuffle(self.conv(x), 2)
        return h


class Enlarge(nn.Module):
    """Nearest neighbours, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h


class Smooth(nn.Module):
    """Two convolutions on whole pixels, added to what a pixel shuffle made block by block.

    They see that, `HIDDEN` channels that were folded like it, and the network's input.
    """

    HIDDEN = 8

    def __init__(self, i: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.fold = nn.Conv2d(i, self.HIDDEN * patch**2, 1)
        self.conv1 = nn.Conv2d(self.HIDDEN + 6, channels, 3, padding=1)
        self.conv2 = zeros(nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, out: Tensor, h: Tensor, x_t: Tensor) -> Tensor:
        """`out`, `x_t` (B, 3, H, W), `h` (B, i, H/patch, W/patch) -> (B, 3, H, W)."""
        seen = torch.cat([out, F.pixel_shuffle(self.fold(h), self.patch), x_t], 1)
        smoothed: Tensor = out + self.conv2(F.silu(self.conv1(seen)))
        return smoothed


def norm(preset: str, channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels) if preset == "paper" else RMSNorm(channels)


def zeros(module: _Layer) -> _Layer:
    """Start as zero, so that a residual block starts as the identity."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def blocks(module: nn.Module) -> nn.ModuleList:
    """`module` itself, for the type checker: an entry of a list of lists."""
    assert isinstance(module, nn.ModuleList)
    return module
