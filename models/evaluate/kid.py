"""KID: unbiased squared MMD of a cubic kernel (Bińkowski 2018) between patches' features.

Features are AlexNet's conv5 as LPIPS carries it; patches are 128 pixels wide. Originals and
decodes show the same scenes, and patches of one picture resemble each other, so that neither side
is a set of independent draws: an average over all pairs would count likeness of content as
closeness. Only pairs from *different* pictures are averaged, in all three terms: the U-statistic
of Gretton 2012 (lemma 6, eq. 4) with pictures as draws. Identical sides give exactly zero.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.evaluate.bootstrap import Statistic
from models.evaluate.metrics import LpipsAlex

Array = NDArray[np.float64]

PATCH = 128
"""Side of a patch: 24 of them tile 768x512, and conv5 still sees 7x7 places of each."""


def patches(picture: Tensor) -> Tensor:
    """`picture` (1, 3, H, W) -> side by side from its middle (N, 3, 128, 128); N may be 0."""
    height, width = picture.shape[2:]
    rows, columns = height // PATCH, width // PATCH
    top, left = (height - rows * PATCH) // 2, (width - columns * PATCH) // 2
    cut = picture[0, :, top : top + rows * PATCH, left : left + columns * PATCH]
    grid = cut.reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    return grid.reshape(rows * columns, 3, PATCH, PATCH)


def features(net: LpipsAlex, picture: Tensor) -> Array:
    """`picture` (1, 3, H, W) in [0, 1] -> (N, 256), N patches."""
    own = patches(picture)
    if not len(own):
        return np.empty((0, 256))
    parts = [net.conv5(part) for part in torch.split(own, 32)]  # bounded memory on large pictures
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def statistic(originals: Sequence[Array], decodes: Sequence[Array]) -> Statistic:
    """KID of P pictures, each (N, D) a side and N alike, under weights of the pictures.

    NaN where fewer than two pictures have weight.
    """
    counts = np.array([len(f) for f in originals])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    x, y = np.concatenate(originals), np.concatenate(decodes)

    def with_all(a: Array, b: Array) -> Array:
        """Sums over one picture's pairs with each: its rows of the kernels alone are in memory."""
        h = _kernel(a, x) + _kernel(b, y) - _kernel(a, y) - _kernel(b, x)
        return np.add.reduceat(h.sum(0), starts)

    sums = np.array([with_all(*both) for both in zip(originals, decodes, strict=True)])
    pairs = np.outer(counts, counts).astype(np.float64)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(pairs, 0)

    def weighted(weights: Array) -> Array:
        above, below = ((weights @ m * weights).sum(1) for m in (sums, pairs))
        return np.asarray(above / below)

    return weighted


def _kernel(a: Array, b: Array) -> Array:
    """(M, D) and (N, D) -> (M, N): (a·b / D + 1)³."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)
