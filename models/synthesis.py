"""`g_s`: latents to the instant picture.

The network runs folded: the inverse GDN's parameters are worked out once, and its last transposed
convolution, three channels wide, is a 3×3 convolution and a pixel shuffle, which is twice as fast.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import tiles
from models.msh import GDN

STRIP = 32
"""Rows of the finest features at a time: they stay in the cache from the last but one layer on."""


class Synthesis:
    """The codec's own decoder, in windows: memory is bounded."""

    def __init__(self, g_s: nn.Sequential, M: int, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.net = Folded(g_s).to(self.device).to(memory_format=torch.channels_last)
        self.M = M

    def __call__(self, y_hat: Tensor) -> Tensor:
        """`y_hat` (1, M, h, w) -> image (1, 3, 16h, 16w) in [0, 1] on the CPU, still padded.

        Raises `ValueError` unless `y_hat` has M channels.
        """
        if y_hat.dim() != 4 or y_hat.shape[:2] != (1, self.M):
            raise ValueError(f"y_hat of shape {tuple(y_hat.shape)}; (1, {self.M}, h, w) is needed")
        with torch.inference_mode():
            return tiles.synthesise(self.net, y_hat.to(self.device)).clamp_(0, 1)


class Folded(nn.Module):
    """What `g_s` computes, to 1e-5, for decoding alone."""

    def __init__(self, g_s: nn.Sequential) -> None:
        super().__init__()
        *head, last_gdn, last = (InverseGDN(m) if isinstance(m, GDN) else m for m in g_s)
        assert isinstance(last_gdn, InverseGDN)
        assert isinstance(last, nn.ConvTranspose2d)
        self.head = nn.Sequential(*head)
        self.tail = nn.Sequential(last_gdn, SubPixel(last))
        self.requires_grad_(False)

    def forward(self, y_hat: Tensor) -> Tensor:
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

    def __init__(self, gdn: GDN) -> None:
        super().__init__()
        beta, gamma = gdn.worked_out()
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
