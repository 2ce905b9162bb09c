"""Baseline pictures: trivial changes of the instant picture that a perceptual tier has to beat.

LPIPS and NIQE reward grain and sharp edges, whether or not they resemble the original. The two
baselines are the instant picture with white noise and with an unsharp mask. Each has the same PSNR
as the perceptual picture. They show which part of a gain in these metrics is trivial.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.evaluate.metrics import mse, psnr

NOISE, UNSHARP = "msh+noise", "msh+unsharp"
NAMES = (NOISE, UNSHARP)
TOLERANCE_DB = 0.02
"""The report names baselines whose PSNR differs by more from that of the perceptual picture."""
RADIUS = 1.0
"""Standard deviation of the unsharp mask's blur, in pixels."""
_LIMIT = {NOISE: 1.0, UNSHARP: 64.0}
"""Largest amplitudes of the search; there the picture is only noise, or only halos."""
_HALVINGS = 24


def baseline(name: str, instant: Tensor, x: Tensor, target: float) -> Tensor:
    """Change `instant` (1, 3, H, W) until its MSE to the original `x` is closest to `target`.

    The values are rounded to 8 bits. If no amplitude reaches `target`, or `instant` is beyond it
    already, the result is the closest picture found.
    """
    direction = _noise(instant) if name == NOISE else _edges(instant)

    def changed(amplitude: float) -> Tensor:
        return ((instant + amplitude * direction).clamp(0, 1) * 255).round() / 255

    return _closest(changed, _LIMIT[name], x, target)


def gap_db(value: float, target: float) -> float:
    """Absolute difference of two mean squared errors in dB."""
    return abs(psnr(value) - psnr(target)) if value != target else 0.0


def _closest(changed: Callable[[float], Tensor], limit: float, x: Tensor, target: float) -> Tensor:
    """Search the amplitude by doubling, then bisection; return the closest picture of all tried."""
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
    from torchvision.transforms.functional import gaussian_blur

    size = 2 * math.ceil(3 * RADIUS) + 1
    blurred: Tensor = gaussian_blur(picture, [size, size], [RADIUS, RADIUS])
    return picture - blurred
