"""`g_s` for decoding alone: the network of the codec's weights, rearranged.

Channels that do not reach the picture are left out, the inverse GDN's parameters are worked out
once, and the last transposed convolution, three channels wide, is a 3×3 convolution and a pixel
shuffle, which is twice as fast.
"""

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec.msh import GDN

STRIP = 32
"""Rows of the finest features at a time: they stay in the cache from the last but one layer on."""


class Folded(nn.Module):
    """What `g_s` computes, to 1e-5, for decoding alone."""

    read: Tensor
    """Channels of `y_hat` that reach the picture."""

    def __init__(self, g_s: nn.Sequential) -> None:
        super().__init__()
        read = live(g_s)
        self.register_buffer("read", read[0].nonzero()[:, 0], persistent=False)
        *head, last_gdn, last = (_narrow(m, *io) for m, io in zip(g_s, pairwise(read), strict=True))
        assert isinstance(last, nn.ConvTranspose2d)
        self.head = nn.Sequential(*head)
        self.tail = nn.Sequential(last_gdn, SubPixel(last))
        self.requires_grad_(False)

    def forward(self, y_hat: Tensor) -> Tensor:
        if len(self.read) < y_hat.shape[1]:
            y_hat = y_hat[:, self.read].contiguous(memory_format=torch.channels_last)
        h = self.head(y_hat)  # (1, N, 8h, 8w)
        rows = h.shape[2]
        out: Tensor = h.new_empty(1, 3, 2 * rows, 2 * h.shape[3])
        for top in range(0, rows, STRIP):
            bottom = min(top + STRIP, rows)
            first = max(top - 1, 0)  # a row more on each side, for the 3×3 convolution
            made = self.tail(h[:, :, first : bottom + 1])
            skip = 2 * (top - first)
            out[:, :, 2 * top : 2 * bottom] = made[:, :, skip : skip + 2 * (bottom - top)]
        return out


class InverseGDN(nn.Module):
    """x sqrt(beta + gamma x²), from the parameters that the training form stands for."""

    def __init__(self, beta: Tensor, gamma: Tensor) -> None:
        """`beta` (C,), `gamma` (C, C, 1, 1) as they are multiplied with."""
        super().__init__()
        self.norm = nn.Conv2d(len(beta), len(beta), 1)
        self.norm.weight.data.copy_(gamma)
        self.norm.bias.data.copy_(beta)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        norm: Tensor = self.norm(x * x)
        out: Tensor = norm.sqrt_().mul_(x)
        return out


class SubPixel(nn.Module):
    """A transposed 5×5 convolution of stride 2 as a 3×3 convolution to four phases.

    An output at 2n + a reads the inputs n + d through tap k = a + 2 - 2d, where 0 <= k < 5.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
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


def live(g_s: nn.Sequential) -> list[Tensor]:
    """Masks of the channels that reach the picture: of what each layer reads, and of the picture.

    A codec that was widened without a change of what it computes has channels that do not.
    """
    masks = [torch.ones(3, dtype=torch.bool)]
    for layer in reversed(g_s):
        wanted = masks[0]
        if isinstance(layer, GDN):
            weights = layer.worked_out()[1][wanted]  # (out, in, 1, 1)
            masks[0] = wanted = wanted | (weights != 0).any(0)[:, 0, 0]
        else:
            assert isinstance(layer, nn.ConvTranspose2d)
            wanted = (layer.weight[:, wanted] != 0).any(1).any(1).any(1)
        masks.insert(0, wanted if wanted.any() else torch.ones_like(wanted))
    return masks


def _narrow(layer: nn.Module, i: Tensor, o: Tensor) -> nn.Module:
    """A layer of `g_s` from the channels `i` to the channels `o`, masks."""
    if isinstance(layer, GDN):
        beta, gamma = layer.worked_out()
        return InverseGDN(beta[o], gamma[o][:, i])
    assert isinstance(layer, nn.ConvTranspose2d)
    assert layer.bias is not None
    k, stride = layer.kernel_size[0], layer.stride[0]
    made = nn.ConvTranspose2d(int(i.sum()), int(o.sum()), k, stride, k // 2, stride - 1)
    made.weight.data.copy_(layer.weight[i][:, o])
    made.bias.data.copy_(layer.bias[o])  # type: ignore[union-attr]
    return made
