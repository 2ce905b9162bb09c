"""Null pictures: what a perceptual gain has to be compared with.

LPIPS and NIQE reward grain and sharp edges for themselves. The instant picture with white noise,
or unsharp-masked, each as far from the original as the perceptual picture, shows how much of a
gain comes for nothing.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

from models.evaluate.metrics import mse, psnr

NOISE, UNSHARP = "msh+noise", "msh+unsharp"
NAMES = (NOISE, UNSHARP)
TOLERANCE_DB = 0.02
"""Nulls farther than this from the perceptual picture's PSNR are named in the report."""
RADIUS = 1.0
"""Standard deviation of the unsharp mask's blur, in pixels."""
_LIMIT = {NOISE: 1.0, UNSHARP: 64.0}
"""Amplitudes at which a picture is all noise, or all halo."""
_HALVINGS = 24


def null(name: str, msh: Tensor, x: Tensor, target: float) -> Tensor:
    """`msh` (1, 3, H, W), changed until its MSE to `x` is nearest to `target`; 8-bit values.

    Where `msh` alone is farther than `target`, or no amplitude reaches it, the nearest is taken.
    """
    direction = _noise(msh) if name == NOISE else _edges(msh)

    def changed(amplitude: float) -> Tensor:
        return ((msh + amplitude * direction).clamp(0, 1) * 255).round() / 255

    return _nearest(changed, _LIMIT[name], x, target)


def gap_db(value: float, target: float) -> float:
    """How far apart two mean squared errors are, in dB."""
    return abs(psnr(value) - psnr(target)) if value != target else 0.0


def _nearest(changed: Callable[[float], Tensor], limit: float, x: Tensor, target: float) -> Tensor:
    """Bracket by doubling, then bisection; the nearest picture met on the way."""
    best, best_gap = changed(0), math.inf

    def beyond(amplitude: float) -> bool:
        nonlocal best, best_gap
        picture = changed(amplitude)
        value = mse(picture, x)
        if gap_db(value, target) < best_gap:
            best, best_gap = picture, gap_db(value, target)
        return value > target

    low, high = 0.0, 2.0**-10 * limit
    if beyond(low):
        return best
    while high < limit and not beyond(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return best


def _noise(like: Tensor) -> Tensor:
    values = np.random.default_rng(0).standard_normal(tuple(like.shape), np.float32)
    return torch.from_numpy(values)


def _edges(picture: Tensor) -> Tensor:
    size = 2 * math.ceil(3 * RADIUS) + 1
    blurred: Tensor = gaussian_blur(picture, [size, size], [RADIUS, RADIUS])
    return picture - blurred
