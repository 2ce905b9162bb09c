"""A convolutional network over a large picture, window by window, with the result of the whole."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.geometry import STRIDE_Y

CODEC_WINDOW = 68**2
"""Latent positions in a window of `g_a` and `g_s`: 1088×1088 pixels, about 0.5 GB meanwhile."""
CODEC_OVERLAP = 2
"""Latent positions read beyond what is kept. Four 5×5 convolutions of stride 2 in the analysis
reach (2 + 4 + 8 + 16) / 16 < 2 positions, those of the synthesis 1 + 1/2 + 1/4 + 1/8 < 2."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rows and columns, in latent positions: what is kept, and more around it that is read."""

    kept: tuple[int, int, int, int]  # top, bottom, left, right
    read: tuple[int, int, int, int]

    def reads(self, scale: int) -> tuple[slice, ...]:
        """What to cut from a map that has `scale` samples per position."""
        return _slices(self.read, scale)

    def writes(self, scale: int) -> tuple[slice, ...]:
        """Where in the whole result the kept part belongs."""
        return _slices(self.kept, scale)

    def within(self, scale: int) -> tuple[slice, ...]:
        """Where the kept part lies in what was computed from `reads`."""
        (top, bottom, left, right), (y, _, x, _) = self.kept, self.read
        return _slices((top - y, bottom - y, left - x, right - x), scale)


def windows(rows: int, columns: int, area: int, overlap: int) -> Iterator[Window]:
    """Windows that together keep every position once, of at most `area` positions to read.

    Of all grids that fit, the one that computes the fewest positions twice; `ValueError` where
    none does.
    """
    n_rows, n_columns = _grid(rows, columns, area, overlap)
    for i in range(n_rows):
        top, bottom = rows * i // n_rows, rows * (i + 1) // n_rows
        for j in range(n_columns):
            left, right = columns * j // n_columns, columns * (j + 1) // n_columns
            yield Window(
                (top, bottom, left, right),
                (
                    max(top - overlap, 0),
                    min(bottom + overlap, rows),
                    max(left - overlap, 0),
                    min(right + overlap, columns),
                ),
            )


def analyse(g_a: Callable[[Tensor], Tensor], x: Tensor, M: int) -> Tensor:
    """`g_a` over `x` (1, 3, 16h, 16w) -> (1, M, h, w)."""
    rows, columns = x.shape[2] // STRIDE_Y, x.shape[3] // STRIDE_Y
    out = torch.empty(1, M, rows, columns)
    for w in windows(rows, columns, CODEC_WINDOW, CODEC_OVERLAP):
        made = g_a(x[w.reads(STRIDE_Y)].contiguous(memory_format=torch.channels_last))
        out[w.writes(1)] = made[w.within(1)]
    return out


def synthesise(g_s: Callable[[Tensor], Tensor], y_hat: Tensor) -> Tensor:
    """`g_s` over `y_hat` (1, M, h, w) -> (1, 3, 16h, 16w)."""
    rows, columns = y_hat.shape[2:]
    out = torch.empty(1, 3, rows * STRIDE_Y, columns * STRIDE_Y)
    for w in windows(rows, columns, CODEC_WINDOW, CODEC_OVERLAP):
        made = g_s(y_hat[w.reads(1)].contiguous(memory_format=torch.channels_last))
        out[w.writes(STRIDE_Y)] = made[w.within(STRIDE_Y)]
    return out


def cut(window: Window, maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, ...]:
    """What `window` reads of each map (B, C, 16h/s, 16w/s) with its stride s."""
    return tuple(
        m[window.reads(STRIDE_Y // s)].contiguous(memory_format=torch.channels_last)
        for m, s in zip(maps, strides, strict=True)
    )


def _grid(rows: int, columns: int, area: int, overlap: int) -> tuple[int, int]:
    best, cost = None, math.inf
    for n_rows in range(1, rows + 1):
        height = math.ceil(rows / n_rows) + (2 * overlap if n_rows > 1 else 0)
        n_columns = _cuts(columns, area // height, overlap)
        if n_columns is None:
            continue
        twice = (rows + 2 * overlap * (n_rows - 1)) * (columns + 2 * overlap * (n_columns - 1))
        if twice < cost:
            best, cost = (n_rows, n_columns), twice
    if best is None:
        raise ValueError(f"no windows of {area} positions overlap by {overlap}")
    return best


def _cuts(columns: int, width: int, overlap: int) -> int | None:
    """The fewest pieces of `columns` that are at most `width` wide with their overlap."""
    if columns <= width:
        return 1
    inner = width - 2 * overlap
    return math.ceil(columns / inner) if inner > 0 else None


def _slices(edges: tuple[int, int, int, int], scale: int) -> tuple[slice, ...]:
    top, bottom, left, right = (edge * scale for edge in edges)
    return slice(None), slice(None), slice(top, bottom), slice(left, right)
