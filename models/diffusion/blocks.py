"""Layers of the U-Nets."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.presets import UNetConfig

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


class RMSNorm(nn.Module):
    """Divide each pixel by the RMS of its channels; multiply by a learned gain per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        # as few passes over memory as possible: on a CPU they take a third of a step
        power = torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]
        return x * torch.rsqrt(power + 1e-5) * self.gain[None, :, None, None]


class Attention(nn.Module):
    """Residual self-attention over all positions, with four heads."""

    HEADS = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm_layer("paper", channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.HEADS, c // self.HEADS, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, H W, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(attended.transpose(2, 3).reshape(b, c, h, w))
        return out


class Block(nn.Module):
    """Residual block of two 3×3 convolutions, modulated by the embedding.

    The embedding's scale and shift follow the first norm in `compact`, the second in `paper`.
    """

    def __init__(self, i: int, o: int, c: UNetConfig, attention: bool = False) -> None:
        super().__init__()
        self.late = c.preset == "paper"
        self.norm1, self.norm2 = norm_layer(c.preset, i), norm_layer(c.preset, o)
        self.conv1 = nn.Conv2d(i, o, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(o, o, 3, padding=1))
        self.modulation = nn.Linear(c.embedding, 2 * (o if self.late else i))
        if not self.late:
            zero_init(self.modulation)
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


class ShuffleDown(nn.Module):
    """(B, i, H, W) -> (B, o, H/2, W/2): pixel unshuffle, then a 1×1 convolution."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pixel_unshuffle(x, 2))
        return h


class ShuffleUp(nn.Module):
    """(B, i, H, W) -> (B, o, 2H, 2W): a 1×1 convolution, then pixel shuffle."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, 4 * o, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = F.pixel_shuffle(self.conv(x), 2)
        return h


class NearestUp(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest-neighbour upsampling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h


class PixelRefinement(nn.Module):
    """Two convolutions at full resolution, which remove the block pattern of a pixel shuffle.

    They read the shuffled output, `HIDDEN` more shuffled channels and the network's input. Their
    result is added to the shuffled output.
    """

    HIDDEN = 8

    def __init__(self, i: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.fold = nn.Conv2d(i, self.HIDDEN * patch**2, 1)
        self.conv1 = nn.Conv2d(self.HIDDEN + 6, channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, out: Tensor, h: Tensor, x_t: Tensor) -> Tensor:
        """`out`, `x_t` (B, 3, H, W), `h` (B, i, H/patch, W/patch) -> (B, 3, H, W)."""
        hidden = F.pixel_shuffle(self.fold(h), self.patch)
        inputs = torch.cat([out, hidden, x_t.to(out.dtype)], 1)  # else all become float32 first
        refined: Tensor = out + self.conv2(F.silu(self.conv1(inputs)))
        return refined


def norm_layer(preset: str, channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels) if preset == "paper" else RMSNorm(channels)


def zero_init(module: _Layer) -> _Layer:
    """Set weight and bias to zero, so that a residual block starts as the identity."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def as_module_list(module: nn.Module) -> nn.ModuleList:
    """Narrow the type of an entry in a list of module lists, for the type checker."""
    assert isinstance(module, nn.ModuleList)
    return module
