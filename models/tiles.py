"""Run a convolutional network over a large picture in overlapping windows.

The result equals that of one call on the whole picture, while memory use stays bounded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import cancellation
from models.geometry import STRIDE_Y

CODEC_WINDOW = 68**2
"""Latent positions per window of `g_a` and `g_s`: 1088×1088 pixels, about 0.5 GB of activations."""
CODEC_OVERLAP = 2
"""Margin of a window, in latent positions: the receptive field of the codec's four 5×5 convolutions
of stride 2. That is (2 + 4 + 8 + 16) / 16 < 2 in the analysis, 1 + 1/2 + 1/4 + 1/8 < 2 in the
synthesis."""


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of latent positions to compute, and the larger one to read for it.

    Both are (top, bottom, left, right). The methods return slices (all, all, rows, columns) of a
    tensor that has `scale` samples per latent position.
    """

    kept: tuple[int, int, int, int]
    read: tuple[int, int, int, int]  # `kept` plus the overlap, clipped at the picture's edges

    def reads(self, scale: int) -> tuple[slice, ...]:
        """Slices of the whole input that this window reads."""
        return _slices(self.read, scale)

    def writes(self, scale: int) -> tuple[slice, ...]:
        """Slices of the whole output that this window fills."""
        return _slices(self.kept, scale)

    def within(self, scale: int) -> tuple[slice, ...]:
        """Slices of the network's output for this window that are kept: those without overlap."""
        (top, bottom, left, right), (y, _, x, _) = self.kept, self.read
        return _slices((top - y, bottom - y, left - x, right - x), scale)


def windows(rows: int, columns: int, area: int, overlap: int) -> Iterator[Window]:
    """Cut a grid of latent positions into windows that read at most `area` positions each.

    Exactly one window keeps each position. The grid of windows is the one that reads the fewest
    positions more than once. Raises `ValueError` if `area` is too small for the overlap.
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


def analyse(
    g_a: Callable[[Tensor], Tensor], x: Tensor, M: int, overlap: int = CODEC_OVERLAP
) -> Tensor:
    """Run `g_a` in windows: x (1, 3, 16h, 16w) -> y (1, M, h, w)."""
    rows, columns = x.shape[2] // STRIDE_Y, x.shape[3] // STRIDE_Y
    out = torch.empty(1, M, rows, columns)
    for w in windows(rows, columns, CODEC_WINDOW, overlap):
        cancellation.check()
        part = g_a(x[w.reads(STRIDE_Y)].contiguous(memory_format=torch.channels_last))
        out[w.writes(1)] = part[w.within(1)]
    return out


def synthesise(
    g_s: Callable[[Tensor], Tensor],
    y_hat: Tensor,
    dtype: torch.dtype = torch.float32,
    overlap: int = CODEC_OVERLAP,
) -> Tensor:
    """Run `g_s`, whose result has `dtype`, in windows: y_hat (1, M, h, w) -> (1, 3, 16h, 16w)."""
    rows, columns = y_hat.shape[2:]
    out = torch.empty(1, 3, rows * STRIDE_Y, columns * STRIDE_Y, dtype=dtype)
    for w in windows(rows, columns, CODEC_WINDOW, overlap):
        cancellation.check()
        part = g_s(y_hat[w.reads(1)].contiguous(memory_format=torch.channels_last))
        out[w.writes(STRIDE_Y)] = part[w.within(STRIDE_Y)]
    return out


def cut(window: Window, maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, ...]:
    """Cut what `window` reads out of several maps.

    Each map is (B, C, 16h/s, 16w/s), where s is its entry in `strides`.
    """
    return tuple(
        m[window.reads(STRIDE_Y // s)].contiguous(memory_format=torch.channels_last)
        for m, s in zip(maps, strides, strict=True)
    )


def _grid(rows: int, columns: int, area: int, overlap: int) -> tuple[int, int]:
    """Return the numbers of windows down and across that read the fewest positions in all."""
    best, fewest = None, math.inf
    for n_rows in range(1, rows + 1):
        height = math.ceil(rows / n_rows) + (2 * overlap if n_rows > 1 else 0)
        n_columns = _pieces(columns, area // height, overlap)
        if n_columns is None:
            continue
        read = (rows + 2 * overlap * (n_rows - 1)) * (columns + 2 * overlap * (n_columns - 1))
        if read < fewest:
            best, fewest = (n_rows, n_columns), read
    if best is None:
        raise ValueError(
            f"a window of {area} positions is too small for an overlap of {overlap} positions"
        )
    return best


def _pieces(columns: int, width: int, overlap: int) -> int | None:
    """Return the smallest number of pieces that fit into `width` with their overlap, or None."""
    if columns <= width:
        return 1
    inner = width - 2 * overlap
    return math.ceil(columns / inner) if inner > 0 else None


def _slices(edges: tuple[int, int, int, int], scale: int) -> tuple[slice, ...]:
    top, bottom, left, right = (edge * scale for edge in edges)
    return slice(None), slice(None), slice(top, bottom), slice(left, right)
