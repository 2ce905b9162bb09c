"""Forward processes x_t = sqrt(a) x0 + sqrt(1 - a) eps, where `a` is alpha-bar.

`Continuous` belongs to the compact presets: t in [0, 1], sqrt(a) = cos(pi t / 2) (the cosine
schedule of Nichol & Dhariwal 2021 without its offset; zero terminal SNR, Lin 2023). `Discrete`
belongs to the paper's preset: 4000 steps of the cosine schedule with offset. Coefficients are
float64.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.tiers import MAX_STEPS

Scalar = TypeVar("Scalar", float, Tensor)


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """One step, from `a` (alpha-bar) at time `t` in [0, 1] to `a_prev`, which is 1 at the end."""

    t: float
    a: float
    a_prev: float


class Schedule(Protocol):
    """Interface of a forward process for the samplers."""

    def steps(self, n: int, start: float = 1.0) -> list[SamplingStep]:
        """Respace the process to `n` steps at decreasing times from `start`.

        Raises `ValueError` unless 1 <= n <= 1000.
        """
        ...


class Continuous:
    """Continuous time; the steps are at t = start, start (1 - 1/n), …"""

    def steps(self, n: int, start: float = 1.0) -> list[SamplingStep]:
        _check(n)
        times = [start * (1 - i / n) for i in range(n)] + [0.0]
        return [
            SamplingStep(t, alpha_bar(t), alpha_bar(t_prev))
            for t, t_prev in zip(times, times[1:], strict=False)
        ]


class Discrete:
    """Discrete time with `T` steps (Nichol & Dhariwal 2021, eq. 17, betas at most .999).

    The time is t = index / (T - 1), and `alphas_cumprod` is (T,) float64. A request for ten of 4000
    steps uses the indices 3999, 3555, …, 444, 0.
    """

    def __init__(self, T: int = 4000) -> None:
        self.T = T
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        self.betas: NDArray[np.float64] = np.minimum(1 - f[1:] / f[:-1], 0.999)
        self.alphas_cumprod: NDArray[np.float64] = np.cumprod(1 - self.betas)

    def steps(self, n: int, start: float = 1.0) -> list[SamplingStep]:
        _check(n)
        last = round(start * (self.T - 1))
        indexes = np.linspace(last, 0, n).round().astype(int).tolist() if n > 1 else [last]
        a = [float(self.alphas_cumprod[i]) for i in indexes] + [1.0]
        return [SamplingStep(i / (self.T - 1), a[k], a[k + 1]) for k, i in enumerate(indexes)]


@functools.cache
def discrete() -> Discrete:
    """The paper's process, computed once."""
    return Discrete()


def alpha_bar(t: float) -> float:
    """alpha-bar of `Continuous` at `t`: exactly 1 at t = 0 and 0 at t = 1."""
    if t >= 1:
        return 0.0
    return math.cos(math.pi / 2 * t) ** 2


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """`t` (B,) of `Continuous` -> sqrt(a), sqrt(1 - a), each (B, 1, 1, 1) float32."""
    angle = t.double()[:, None, None, None] * (math.pi / 2)
    return torch.cos(angle).float(), torch.sin(angle).float()


def x0_from_v(x_t: Scalar, v: Scalar, a: float) -> Scalar:
    """x0 from a v-prediction: appendix D of arXiv:2202.00512."""
    return math.sqrt(a) * x_t - math.sqrt(1 - a) * v


def eps_from_v(x_t: Scalar, v: Scalar, a: float) -> Scalar:
    """eps from a v-prediction, consistent with `x0_from_v`."""
    return math.sqrt(1 - a) * x_t + math.sqrt(a) * v


def x0_from_eps(x_t: Scalar, eps: Scalar, a: float) -> Scalar:
    """x0 from a noise prediction: eq. 15 of arXiv:2006.11239."""
    return (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)


def eps_from_x0(x_t: Scalar, x0: Scalar, a: float) -> Scalar:
    """The inverse of `x0_from_eps`."""
    return (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)


def _check(n: int) -> None:
    if not 1 <= n <= MAX_STEPS:
        raise ValueError(f"steps is {n}; choose 1 to {MAX_STEPS}")
