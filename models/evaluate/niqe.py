"""NIQE: distance between the statistics of a picture and those of undistorted photographs.

Mittal, Soundararajan and Bovik 2013, "Making a completely blind image quality analyzer" (IEEE
Signal Processing Letters 20). The statistics of undistorted ("pristine") photographs are those of
the authors; the file has its own licence.
"""

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import gamma

from models.image import Pixels

Array = NDArray[np.float64]

BLOCK = 96
"""Side of the blocks at full scale; each block gives one feature vector."""
FILE = Path(__file__).parent / "niqe_pristine.npz"
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Offsets (y, x) of the neighbours whose products are modelled: right, below, both diagonals."""
_BORDER = 8
"""Mirrored pixels around a picture before halving; the bicubic kernel reaches 4 of them."""


def niqe(pixels: Pixels) -> float | None:
    """NIQE of `pixels` (H, W, 3), lower is better; None with fewer than two usable blocks."""
    y = _luma(pixels)
    height, width = (side // BLOCK * BLOCK for side in y.shape)
    if height * width < 2 * BLOCK**2:
        return None
    y = y[:height, :width]
    features = np.hstack([_features(y, BLOCK), _features(_halved(y), BLOCK // 2)])  # (N, 36)
    features = features[np.isfinite(features).all(1)]  # a flat block has no finite fit
    return _distance(features) if len(features) > 1 else None


def _distance(features: Array) -> float:
    """Distance between the Gaussian fitted to the features (N, 36) and the pristine Gaussian."""
    mu, covariance = _pristine()
    difference = mu - features.mean(0)
    pooled = (covariance + np.cov(features, rowvar=False)) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(pooled) @ difference))


@functools.cache
def _pristine() -> tuple[Array, Array]:
    with np.load(FILE) as model:
        return model["mu_pris_param"].ravel(), model["cov_pris_param"]


def _luma(pixels: Pixels) -> Array:
    """BT.601 luma from 0 to 255, rounded to integers.

    The order of the sum must not change: it decides how values of .5 are rounded, and thereby the
    third decimal of NIQE.
    """
    r, g, b = np.moveaxis(pixels, 2, 0)
    return np.asarray(np.round(0.299 * r + 0.587 * g + 0.114 * b), np.float64)


def _halved(y: Array) -> Array:
    """`y` (H, W) -> (H/2, W/2): bicubic over eight pixels, with mirrored borders."""
    padded = Image.fromarray(np.pad(y, _BORDER, "symmetric").astype(np.float32))
    size = (padded.width // 2, padded.height // 2)
    half = np.asarray(padded.resize(size, Image.Resampling.BICUBIC), np.float64)
    cut = _BORDER // 2
    return half[cut:-cut, cut:-cut]


def _features(y: Array, side: int) -> Array:
    """Features (N, 18) of the blocks of `y` (H, W): fits to normalised values and products."""
    normal = _mscn(y)
    rows, columns = (n // side for n in normal.shape)
    blocks = normal.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    alpha, left, right = _fit(blocks)
    out = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        alpha, left, right = _fit(blocks * np.roll(blocks, shift, (1, 2)))
        mean = (right - left) * gamma(2 / alpha) / gamma(1 / alpha)
        out += [alpha, mean, left, right]
    return np.stack(out, 1)


def _mscn(y: Array) -> Array:
    """Mean-subtracted, contrast-normalised luma (eqs. 1 to 3) with windows of 7x7."""
    smooth = functools.partial(gaussian_filter, sigma=7 / 6, radius=3, mode="nearest")
    mu = smooth(y)
    sigma = np.sqrt(np.abs(smooth(y * y) - mu * mu))
    return np.asarray((y - mu) / (sigma + 1))


_ALPHAS = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _ALPHAS) ** 2 / (gamma(1 / _ALPHAS) * gamma(3 / _ALPHAS))
"""(E|x|)² / E x² of a generalised Gaussian for each shape in `_ALPHAS`, increasing."""


def _fit(blocks: Array) -> tuple[Array, Array, Array]:
    """Fit asymmetric generalised Gaussians by moments: shape, left and right scale, each (N,).

    The scales are NaN for a block without values on one side of zero.
    """
    x = blocks.reshape(len(blocks), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((np.minimum(x, 0) ** 2).sum(1) / (x < 0).sum(1))
        right = np.sqrt((np.maximum(x, 0) ** 2).sum(1) / (x > 0).sum(1))
        g = left / right
        ratio = np.abs(x).mean(1) ** 2 / (x**2).mean(1)
        ratio = ratio * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    alpha = _ALPHAS[np.abs(_RATIOS - ratio[:, None]).argmin(1)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * scale, right * scale
