"""Confidence intervals: the percentile bootstrap (Efron 1979) over pictures.

A resample draws pictures with replacement. It is stored as weights: how often each picture was
drawn. A statistic is therefore a function of weights; with all weights 1 it is the figure itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Weights (R, P) of P pictures -> the figure for each of the R weightings (R,)."""

RESAMPLES = 1000
COVERAGE = 0.95
_SEED = 0
"""The same seed for all figures, so that figures of the same pictures have paired resamples."""


@dataclass(frozen=True, slots=True)
class BootstrapEstimate:
    """A figure and its 95 % confidence interval, which is None for a single picture."""

    value: float
    interval: tuple[float, float] | None


def estimate(statistic: Statistic, count: int) -> BootstrapEstimate | None:
    """Estimate the figure of `count` pictures; None if it is not a finite number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.ones((1, count)))[0])
        if not np.isfinite(value):
            return None
        spread = statistic(_resamples(count))
    spread = spread[np.isfinite(spread)]  # KID is not defined for a resample of one picture
    if count < 2 or not len(spread):
        return BootstrapEstimate(value, None)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return BootstrapEstimate(value, (float(low), float(high)))


def mean(values: Sequence[float]) -> Statistic:
    """The mean of one value per picture."""
    return ratio(values, np.ones(len(values)))


def ratio(values: Sequence[float], bases: Sequence[float] | Array) -> Statistic:
    """The mean of `values` divided by the mean of `bases`, one of each per picture."""
    above, below = np.asarray(values, np.float64), np.asarray(bases, np.float64)
    return lambda weights: np.asarray((weights @ above) / (weights @ below))


def _resamples(count: int) -> Array:
    generator = np.random.default_rng(_SEED)
    draws = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws.astype(np.float64)
