"""The forward process: continuous t in [0, 1], variance preserving, cosine, zero terminal SNR.

x_t = alpha x0 + sigma eps with alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021
without the offset; Lin 2023 for the terminal SNR). Coefficients are float64.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

Scalar = TypeVar("Scalar", float, Tensor)


def alpha_bar(t: float) -> float:
    """Cumulative signal power at `t`; exactly 1 at 0 and 0 at 1."""
    if t >= 1:
        return 0.0
    return math.cos(math.pi / 2 * t) ** 2


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """`t` (B,) -> alpha and sigma, each (B, 1, 1, 1) float32 computed in float64."""
    angle = t.double()[:, None, None, None] * (math.pi / 2)
    return torch.cos(angle).float(), torch.sin(angle).float()


def times(steps: int) -> list[float]:
    """Respacing: `steps` denoiser calls at 1, 1 - 1/steps, …; the last entry, 0, is the picture.

    Raises `ValueError` unless 1 <= steps <= 1000.
    """
    if not 1 <= steps <= 1000:
        raise ValueError(f"{steps} steps: between 1 and 1000")
    return [1 - i / steps for i in range(steps)] + [0.0]


def x0_from_v(x_t: Scalar, v: Scalar, a: float) -> Scalar:
    """Eq. in appendix D of arXiv:2202.00512; `a` is alpha-bar."""
    return math.sqrt(a) * x_t - math.sqrt(1 - a) * v


def eps_from_v(x_t: Scalar, v: Scalar, a: float) -> Scalar:
    """The noise that belongs to `x0_from_v`."""
    return math.sqrt(1 - a) * x_t + math.sqrt(a) * v
