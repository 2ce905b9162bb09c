"""Averages over pictures: one line per quality and tier, with confidence intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.evaluate import baselines, bootstrap, kid
from models.evaluate.bootstrap import Statistic
from models.evaluate.measure import INSTANT, ORIGINAL, PERCEPTUAL, DecodeMetrics
from models.evaluate.metrics import psnr

Features = Mapping[tuple[int, str], Mapping[str, NDArray[np.float64]]]
"""(quality, tier) -> picture -> features of its patches; the originals have quality 0."""
Value = Callable[[DecodeMetrics], float | None]
"""A figure of one decoded picture; None if it has none."""

_MEANS: Mapping[str, Value] = {
    "bpp": lambda r: r.bpp,
    "psnr": lambda r: psnr(r.mse),
    "ms_ssim": lambda r: r.ms_ssim,
    "lpips": lambda r: r.lpips,
    "lpips_vgg": lambda r: r.lpips_vgg,
    "dists": lambda r: r.dists,
    "nlpd": lambda r: r.nlpd,
    "gmsd": lambda r: r.gmsd,
    "niqe": lambda r: r.niqe,
    "niqe_original": lambda r: r.niqe_original,
    "niqe_gap": lambda r: _gap(r.niqe, r.niqe_original),
    "offset": lambda r: r.offset,
    "seconds": lambda r: r.seconds,
}
"""Figures that are averaged over the pictures."""


@dataclass(frozen=True, slots=True)
class SummaryLine:
    """Figures of one tier at one quality; a figure that no picture has is missing."""

    quality: int
    tier: str
    pictures: int
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """A JSON object: one key per figure, and the intervals under `intervals`."""
        head = {"quality": self.quality, "tier": self.tier, "pictures": self.pictures}
        return head | self.figures | {"intervals": self.intervals}

    def add(self, name: str, statistic: Statistic, count: int) -> None:
        """Set figure `name` to the statistic of `count` pictures, if that is a finite number."""
        estimate = bootstrap.estimate(statistic, count)
        if estimate is not None:
            self.figures[name] = estimate.value
            if estimate.interval is not None:
                self.intervals[name] = estimate.interval


def summary(rows: Sequence[DecodeMetrics], features: Features | None = None) -> list[SummaryLine]:
    """One line per quality and tier; a picture's figure is the mean over its seeds.

    `features` are for KID.
    """
    lines = []
    for quality, tier in dict.fromkeys((r.quality, r.tier) for r in rows):
        at_quality = [r for r in rows if r.quality == quality]
        lines.append(_line(tier, at_quality, features or {}))
    return lines


def _line(tier: str, at_quality: Sequence[DecodeMetrics], features: Features) -> SummaryLine:
    """The line of `tier`; `at_quality` holds all tiers of one quality."""
    rows = [r for r in at_quality if r.tier == tier]
    line = SummaryLine(rows[0].quality, tier, len({r.picture for r in rows}))
    for name, value in _MEANS.items():
        _add_mean(line, name, rows, value)
    line.figures["offset_max"] = max(r.offset for r in rows)
    shifts = [r.shift for r in rows if r.shift is not None]
    if shifts:
        line.figures["shift_max"] = max(shifts)
    for name in ("psnr", "lpips"):
        _add_spread(line, f"{name}_seeds", rows, _MEANS[name])
    _add_comparison(line, rows, {r.picture: r for r in at_quality if r.tier == INSTANT})
    if tier in baselines.NAMES:
        _add_baseline_gap(line, rows, [r for r in at_quality if r.tier == PERCEPTUAL])
    _add_kid(line, features)
    return line


def _add_comparison(
    line: SummaryLine, rows: Sequence[DecodeMetrics], instant: Mapping[str, DecodeMetrics]
) -> None:
    """Add the figures relative to the instant pictures."""
    if not instant:
        return
    lpips = _by_picture(rows, lambda r: r.lpips)
    base = [instant[picture].lpips for picture in lpips]
    line.add("lpips_ratio", bootstrap.ratio(list(lpips.values()), base), len(lpips))
    _add_mean(line, "psnr_loss", rows, lambda r: psnr(instant[r.picture].mse) - psnr(r.mse))
    line.figures["worse_lpips"] = sum(v > instant[picture].lpips for picture, v in lpips.items())
    first = {r.picture: r.seed for r in reversed(rows)}
    others = [r for r in rows if r.seed != first[r.picture]]
    _add_mean(line, "seeds_ratio", others, lambda r: _quotient(r.seeds_mse, instant[r.picture].mse))


def _add_baseline_gap(
    line: SummaryLine, rows: Sequence[DecodeMetrics], perceptual: Sequence[DecodeMetrics]
) -> None:
    """Add the largest difference in dB between a baseline's PSNR and that of `perceptual`.

    In evaluation.json it is called `null_gap`.
    """
    target = {r.picture: r.mse for r in reversed(perceptual)}  # of the first seed
    line.figures["null_gap"] = max(baselines.gap_db(r.mse, target[r.picture]) for r in rows)


def _add_kid(line: SummaryLine, features: Features) -> None:
    originals = features.get((0, ORIGINAL), {})
    decodes = features.get((line.quality, line.tier), {})
    names = [name for name, patches in decodes.items() if len(patches)]
    if len(names) > 1:
        pair = [originals[n] for n in names], [decodes[n] for n in names]
        line.add("kid", kid.statistic(*pair), len(names))


def _add_mean(line: SummaryLine, name: str, rows: Sequence[DecodeMetrics], value: Value) -> None:
    """Add the mean over the pictures that have the figure, if any has."""
    values = list(_by_picture(rows, value).values())
    if values:
        line.add(name, bootstrap.mean(values), len(values))


def _add_spread(line: SummaryLine, name: str, rows: Sequence[DecodeMetrics], value: Value) -> None:
    """Add the standard deviation over seeds: the root of the mean variance over pictures."""
    several = [v for v in _seeds_of(rows, value).values() if len(v) > 1]
    if several:
        line.figures[name] = float(np.sqrt(np.mean([np.var(v, ddof=1) for v in several])))


def _by_picture(rows: Sequence[DecodeMetrics], value: Value) -> dict[str, float]:
    """Picture -> mean of the figure over its seeds; without pictures that lack the figure."""
    return {picture: sum(v) / len(v) for picture, v in _seeds_of(rows, value).items()}


def _seeds_of(rows: Sequence[DecodeMetrics], value: Value) -> dict[str, list[float]]:
    """Picture -> the figure of each seed; without seeds that lack the figure."""
    out: dict[str, list[float]] = {}
    for row in rows:
        figure = value(row)
        if figure is not None:
            out.setdefault(row.picture, []).append(figure)
    return out


def _gap(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else abs(a - b)


def _quotient(a: float, b: float) -> float | None:
    return a / b if b else None
