"""`g_s` rearranged for inference: the same result from the same weights, but faster.

Channels that do not affect the picture are removed. The coefficients of the inverse GDN are
computed once. The last transposed convolution, which has three output channels, becomes a 3×3
convolution and a pixel shuffle, which is twice as fast.
"""

import copy
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import processor
from models.codec import idle_channels
from models.codec.msh import GDN
from models.codec.networks import ResidualBlockUpsample

PRECISION_VARIABLE = "AFTERIMAGE_GS_PRECISION"
"""Environment variable: f32 (default), or bf16 for processors that support it, which halves the
time and costs 0.005 dB (six Kodak pictures, quality 2). There is no int8: it costs 0.06 dB in the
second layer alone and 0.9 dB in all four. Only OpenVINO computes in bf16."""
STRIP = 32
"""Rows that the last two layers process at a time, so that their features fit the CPU's cache."""


def precision() -> str:
    """Return the precision that `PRECISION_VARIABLE` names: f32 or bf16.

    Raises `ParameterError` if it names another one.
    """
    return processor.precision(PRECISION_VARIABLE, "f32", "bf16")


class InferenceSynthesis(nn.Module):
    """`g_s` for inference; its output equals that of `g_s` to 1e-5."""

    channels: Tensor
    """Indexes of the channels of `y_hat` that affect the picture."""

    def __init__(self, g_s: nn.Sequential) -> None:
        super().__init__()
        masks = idle_channels.used_channels(g_s, torch.ones(3, dtype=torch.bool))
        self.register_buffer("channels", masks[0].nonzero()[:, 0], persistent=False)
        *head, last_gdn, last = (
            _narrow(layer, *in_out) for layer, in_out in zip(g_s, pairwise(masks), strict=True)
        )
        assert isinstance(last, nn.ConvTranspose2d)
        self.head = nn.Sequential(*head)
        self.tail = nn.Sequential(last_gdn, SubPixel(last))
        self.requires_grad_(False)

    def forward(self, y_hat: Tensor) -> Tensor:
        if len(self.channels) < y_hat.shape[1]:
            y_hat = y_hat[:, self.channels].contiguous(memory_format=torch.channels_last)
        h = self.head(y_hat)  # (1, N, 8h, 8w)
        rows = h.shape[2]
        out: Tensor = h.new_empty(1, 3, 2 * rows, 2 * h.shape[3])
        for top in range(0, rows, STRIP):
            bottom = min(top + STRIP, rows)
            first = max(top - 1, 0)  # one more row on each side, for the 3×3 convolution
            strip = self.tail(h[:, :, first : bottom + 1])
            skip = 2 * (top - first)
            out[:, :, 2 * top : 2 * bottom] = strip[:, :, skip : skip + 2 * (bottom - top)]
        return out


class ResidualSynthesis(nn.Module):
    """`g_s` of residual blocks for inference: the coefficients of the inverse GDN are fixed."""

    channels: Tensor

    def __init__(self, g_s: nn.Sequential) -> None:
        super().__init__()
        M = next(layer.in_channels for layer in g_s.modules() if isinstance(layer, nn.Conv2d))
        self.register_buffer("channels", torch.arange(M), persistent=False)
        self.head, self.tail = copy.deepcopy(g_s), nn.Sequential()
        for block in self.head:
            if isinstance(block, ResidualBlockUpsample):
                block.igdn = InverseGDN(*block.igdn.coefficients())  # type: ignore[assignment]
        self.requires_grad_(False)

    def forward(self, y_hat: Tensor) -> Tensor:
        out: Tensor = self.head(y_hat)
        return out


def for_inference(g_s: nn.Sequential) -> InferenceSynthesis | ResidualSynthesis:
    """Return a copy of `g_s` that is fast, with the same result to 1e-5."""
    if isinstance(g_s[-1], nn.ConvTranspose2d):
        return InferenceSynthesis(g_s)
    return ResidualSynthesis(g_s)


class InverseGDN(nn.Module):
    """x sqrt(beta + gamma x²), with fixed coefficients."""

    def __init__(self, beta: Tensor, gamma: Tensor) -> None:
        """Take `beta` (C,) and `gamma` (C, C, 1, 1) as `GDN.coefficients` returns them."""
        super().__init__()
        self.norm = nn.Conv2d(len(beta), len(beta), 1)
        self.norm.weight.data.copy_(gamma)
        self.norm.bias.data.copy_(beta)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        norm: Tensor = self.norm(x * x)
        out: Tensor = norm.sqrt_().mul_(x)
        return out


class SubPixel(nn.Module):
    """A transposed 5×5 convolution of stride 2, as a 3×3 convolution and a pixel shuffle.

    The output at 2n + a (a is 0 or 1) reads the input at n + d (d is -1, 0 or 1) with the kernel's
    tap a + 2 - 2d, where that lies within 0…4.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.transposed = layer
        i, o = layer.weight.shape[:2]
        taps = torch.zeros(o, 2, 2, i, 3, 3)
        for (a, da), (b, db) in product(product((0, 1), (-1, 0, 1)), repeat=2):
            ka, kb = a + 2 - 2 * da, b + 2 - 2 * db
            if ka < 5 and kb < 5:
                taps[:, a, b, :, da + 1, db + 1] = layer.weight.data[:, :, ka, kb].T
        self.conv = nn.Conv2d(i, 4 * o, 3, padding=1)
        self.conv.weight.data.copy_(taps.reshape(4 * o, i, 3, 3))
        assert layer.bias is not None
        assert self.conv.bias is not None
        self.conv.bias.data.copy_(layer.bias.data.repeat_interleave(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.pixel_shuffle(self.conv(x), 2)
        return out


def _narrow(layer: nn.Module, i: Tensor, o: Tensor) -> nn.Module:
    """Return the layer with only the input channels in mask `i` and output channels in mask `o`."""
    if isinstance(layer, GDN):
        beta, gamma = layer.coefficients()
        return InverseGDN(beta[o], gamma[o][:, i])
    if isinstance(layer, nn.ReLU):
        return nn.ReLU(inplace=True)
    assert isinstance(layer, nn.ConvTranspose2d)
    return idle_channels.narrow(layer, i, o)
