"""KID (Bińkowski 2018): unbiased squared MMD with a cubic kernel between features of patches.

The features are conv5 of LPIPS's AlexNet; the patches are 128 pixels wide. Patches are not
independent draws: originals and decodes show the same scenes, and patches of one picture are
similar. An average over all pairs of patches would count equal content as similarity. Therefore all
three terms of the MMD average only pairs from *different* pictures. This is the U-statistic of
Gretton 2012 (lemma 6, eq. 4) with pictures as draws. Two identical sets have distance zero.
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
"""Side of a patch: 24 patches tile 768x512, and conv5 has 7x7 positions on each."""


def patches(picture: Tensor) -> Tensor:
    """Cut `picture` (1, 3, H, W) into patches (N, 3, 128, 128), centred; N may be 0."""
    height, width = picture.shape[2:]
    rows, columns = height // PATCH, width // PATCH
    top, left = (height - rows * PATCH) // 2, (width - columns * PATCH) // 2
    cut = picture[0, :, top : top + rows * PATCH, left : left + columns * PATCH]
    grid = cut.reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    return grid.reshape(rows * columns, 3, PATCH, PATCH)


def features(net: LpipsAlex, picture: Tensor) -> Array:
    """Features (N, 256) of the N patches of `picture` (1, 3, H, W) in [0, 1]."""
    all_patches = patches(picture)
    if not len(all_patches):
        return np.empty((0, 256))
    parts = [net.conv5(part) for part in torch.split(all_patches, 32)]  # bounds the memory
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def statistic(originals: Sequence[Array], decodes: Sequence[Array]) -> Statistic:
    """Return KID of P pictures as a function of their weights.

    `originals` and `decodes` hold features (N, D) of each picture, with the same N in both. KID is
    NaN unless at least two pictures have a weight above 0.
    """
    counts = np.array([len(f) for f in originals])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    x, y = np.concatenate(originals), np.concatenate(decodes)

    def with_all(a: Array, b: Array) -> Array:
        """Kernel sums of one picture with every picture; only its rows are in memory."""
        h = _kernel(a, x) + _kernel(b, y) - _kernel(a, y) - _kernel(b, x)
        return np.add.reduceat(h.sum(0), starts)

    sums = np.array([with_all(*pair) for pair in zip(originals, decodes, strict=True)])
    pairs = np.outer(counts, counts).astype(np.float64)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(pairs, 0)

    def weighted(weights: Array) -> Array:
        above, below = ((weights @ m * weights).sum(1) for m in (sums, pairs))
        return np.asarray(above / below)

    return weighted


def _kernel(a: Array, b: Array) -> Array:
    """Cubic kernel (a·b / D + 1)³ of (M, D) and (N, D): (M, N)."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)
