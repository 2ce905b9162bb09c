"""Intervals for figures of a set of pictures: the percentile bootstrap (Efron 1979) over pictures.

A resample is a row of multiplicities, how often each picture is in it, so that every statistic
is a function of weights: of ones for the figure itself, of a resample for its spread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Weights (R, P) of P pictures -> the figure under each of the R weightings (R,)."""

RESAMPLES = 1000
COVERAGE = 0.95
_SEED = 0
"""One seed for all: figures of the same pictures are resampled alike and stay comparable."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; there is none for a single picture."""

    value: float
    interval: tuple[float, float] | None


def estimate(statistic: Statistic, count: int) -> Estimate | None:
    """The figure over `count` pictures; None where it is not a finite number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.ones((1, count)))[0])
        if not np.isfinite(value):
            return None
        spread = statistic(_resamples(count))
    spread = spread[np.isfinite(spread)]  # a resample of one picture has no pairs
    if count < 2 or not len(spread):
        return Estimate(value, None)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return Estimate(value, (float(low), float(high)))


def mean(values: Sequence[float]) -> Statistic:
    """The mean of one value per picture."""
    return ratio(values, np.ones(len(values)))


def ratio(values: Sequence[float], bases: Sequence[float] | Array) -> Statistic:
    """The mean of one value per picture over the mean of another."""
    above, below = np.asarray(values, np.float64), np.asarray(bases, np.float64)
    return lambda weights: np.asarray((weights @ above) / (weights @ below))


def _resamples(count: int) -> Array:
    generator = np.random.default_rng(_SEED)
    draws = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws.astype(np.float64)
