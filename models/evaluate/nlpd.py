"""NLPD: the normalised Laplacian pyramid distance (Laparra, Ballé, Berardino, Simoncelli 2016).

"Perceptual image quality assessment using a normalized Laplacian pyramid" (HVEI 2016): at six
scales, subtract a local mean and divide by a local amplitude. The weights are the published ones.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve, correlate1d

from models.image import Pixels

Array = NDArray[np.float64]

LOWPASS = np.array([0.05, 0.25, 0.4, 0.25, 0.05])
"""Burt and Adelson's low-pass filter, applied along each axis."""
SIGMAS = (0.0248, 0.0185, 0.0179, 0.0191, 0.0220, 0.2782)
"""Constant part of the amplitude, per scale, finest first."""
NEIGHBOURS = (
    ((0, 0, 0.1011, 0, 0), (0, 0.1493, 0, 0.1460, 0.0072), (0, 0, 0.1015, 0, 0)),
    ((0, 0.0757, 0), (0.1986, 0, 0.1846), (0, 0.0837, 0)),
    ((0, 0.0477, 0), (0.2138, 0, 0.2243), (0, 0.0467, 0)),
    ((0.2503, 0, 0.2616),),
    ((0.2598, 0, 0.2552),),
    ((0.2215, 0, 0.0717),),
)
"""Weights of the neighbours' magnitudes, per scale; mirrored, because they are convolved."""


def nlpd(a: Pixels, b: Pixels) -> float:
    """Distance of two pictures (H, W, 3): mean over scales of the root mean square difference."""
    pairs = zip(_normalised(_luma(a)), _normalised(_luma(b)), strict=True)
    return float(np.mean([np.sqrt(np.square(u - v).mean()) for u, v in pairs]))


def _luma(pixels: Pixels) -> Array:
    """BT.601 luma in [0, 1]."""
    return np.asarray(pixels @ np.array([0.299, 0.587, 0.114]) / 255)


def _normalised(x: Array) -> list[Array]:
    """Normalised pyramid of `x` (H, W): z / (σ + Σ p·|z| over the neighbours) of each scale."""
    out = []
    for z, sigma, weights in zip(_laplacian(x), SIGMAS, NEIGHBOURS, strict=True):
        amplitude: Array = convolve(np.abs(z), np.array(weights, np.float64), mode="constant")
        out.append(z / (sigma + amplitude))
    return out


def _laplacian(x: Array) -> list[Array]:
    """Laplacian pyramid of `x` (eq. 2); the last entry is the low-pass residual."""
    out = []
    for _ in SIGMAS[1:]:
        low = _blur(x, "reflect")[::2, ::2]
        out.append(x - _enlarged(low, x.shape))
        x = low
    return [*out, x]


def _enlarged(low: Array, shape: tuple[int, ...]) -> Array:
    """Upsample `low` by 2 with repeated borders; cut to `shape`."""
    wide = np.pad(low, 1, "edge")
    spread = np.zeros((2 * wide.shape[0], 2 * wide.shape[1]))
    spread[::2, ::2] = 4 * wide
    return _blur(spread, "constant")[2 : 2 + shape[0], 2 : 2 + shape[1]]


def _blur(x: Array, mode: Literal["reflect", "constant"]) -> Array:
    """Blur both axes; `mode` is scipy's, whose `reflect` repeats the border pixel."""
    return correlate1d(correlate1d(x, LOWPASS, 0, mode=mode), LOWPASS, 1, mode=mode)
