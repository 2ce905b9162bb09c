"""A convolutional network over a large picture, tile by tile, with the result of the whole."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.msh import STRIDE_Y

TILE = 48
"""Latent positions along a tile's side: 768 pixels, about 0.5 GB while it is computed."""
OVERLAP = 4
"""Latent positions read beyond a tile. Four 5×5 convolutions of stride 2 in the analysis reach
(2 + 4 + 8 + 16) / 16 < 2 positions, those of the synthesis 1 + 1/2 + 1/4 + 1/8 < 2."""


def analyse(g_a: Callable[[Tensor], Tensor], x: Tensor, M: int) -> Tensor:
    """`g_a` over `x` (1, 3, 16h, 16w) -> (1, M, h, w)."""
    return _tiled(g_a, x, M, STRIDE_Y, 1)


def synthesise(g_s: Callable[[Tensor], Tensor], y_hat: Tensor) -> Tensor:
    """`g_s` over `y_hat` (1, M, h, w) -> (1, 3, 16h, 16w)."""
    return _tiled(g_s, y_hat, 3, 1, STRIDE_Y)


def _tiled(
    net: Callable[[Tensor], Tensor], x: Tensor, channels: int, reads: int, writes: int
) -> Tensor:
    """A latent position is `reads` samples wide in `x` and `writes` in the result."""
    rows, columns = x.shape[2] // reads, x.shape[3] // reads
    out = torch.empty(1, channels, rows * writes, columns * writes)
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            bottom, right = min(top + TILE, rows), min(left + TILE, columns)
            y, x_ = max(top - OVERLAP, 0), max(left - OVERLAP, 0)
            window = _window(y, bottom + OVERLAP, x_, right + OVERLAP, reads)
            made = net(x[window].contiguous(memory_format=torch.channels_last))
            inner = _window(top - y, bottom - y, left - x_, right - x_, writes)
            out[_window(top, bottom, left, right, writes)] = made[inner]
    return out


def _window(top: int, bottom: int, left: int, right: int, scale: int) -> tuple[slice, ...]:
    rows, columns = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
    return slice(None), slice(None), rows, columns
