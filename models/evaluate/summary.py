"""Rows of pictures to one line per quality and tier, with intervals over the pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.evaluate import baselines, bootstrap, kid
from models.evaluate.bootstrap import Statistic
from models.evaluate.measure import INSTANT, ORIGINAL, PERCEPTUAL, Row
from models.evaluate.metrics import psnr

Features = Mapping[tuple[int, str], Mapping[str, NDArray[np.float64]]]
"""(quality, tier) -> picture -> features of its patches; the originals are quality 0."""

_OF_ROW: Mapping[str, Callable[[Row], float | None]] = {
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
"""Figures that are means over pictures of something each row knows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One tier at one quality; a figure that could not be had is missing."""

    quality: int
    tier: str
    pictures: int
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """For JSON: figures beside the names, intervals below `intervals`."""
        own = {"quality": self.quality, "tier": self.tier, "pictures": self.pictures}
        return own | self.figures | {"intervals": self.intervals}

    def add(self, name: str, statistic: Statistic, count: int) -> None:
        """Set `name` from the statistic of `count` pictures, where it is a finite number."""
        estimate = bootstrap.estimate(statistic, count)
        if estimate is not None:
            self.figures[name] = estimate.value
            if estimate.interval is not None:
                self.intervals[name] = estimate.interval


def summary(rows: Sequence[Row], features: Features | None = None) -> list[Line]:
    """Means over pictures, each the mean of its seeds; `features` are for KID."""
    lines = []
    for quality, tier in dict.fromkeys((r.quality, r.tier) for r in rows):
        at_quality = [r for r in rows if r.quality == quality]
        own = [r for r in at_quality if r.tier == tier]
        line = Line(quality, tier, len({r.picture for r in own}))
        for name, value in _OF_ROW.items():
            _add_mean(line, name, own, value)
        line.figures["offset_max"] = max(r.offset for r in own)
        shifts = [r.shift for r in own if r.shift is not None]
        if shifts:
            line.figures["shift_max"] = max(shifts)
        for name in ("psnr", "lpips"):
            _add_spread(line, f"{name}_seeds", own, _OF_ROW[name])
        _compare(line, own, {r.picture: r for r in at_quality if r.tier == INSTANT})
        if tier in baselines.NAMES:
            _add_gap(line, own, [r for r in at_quality if r.tier == PERCEPTUAL])
        _add_kid(line, features or {})
        lines.append(line)
    return lines


def _compare(line: Line, own: Sequence[Row], msh: Mapping[str, Row]) -> None:
    """Figures relative to the instant pictures."""
    if not msh:
        return
    lpips = _by_picture(own, lambda r: r.lpips)
    base = [msh[picture].lpips for picture in lpips]
    line.add("lpips_ratio", bootstrap.ratio(list(lpips.values()), base), len(lpips))
    _add_mean(line, "psnr_loss", own, lambda r: psnr(msh[r.picture].mse) - psnr(r.mse))
    line.figures["worse_lpips"] = sum(v > msh[picture].lpips for picture, v in lpips.items())
    first = {r.picture: r.seed for r in reversed(own)}
    others = [r for r in own if r.seed != first[r.picture]]
    _add_mean(line, "seeds_ratio", others, lambda r: _quotient(r.seeds_mse, msh[r.picture].mse))


def _add_gap(line: Line, own: Sequence[Row], perceptual: Sequence[Row]) -> None:
    """Largest distance of a null picture from the PSNR it should have, in dB."""
    target = {r.picture: r.mse for r in reversed(perceptual)}  # the first seed's stays
    line.figures["null_gap"] = max(baselines.gap_db(r.mse, target[r.picture]) for r in own)


def _add_kid(line: Line, features: Features) -> None:
    originals = features.get((0, ORIGINAL), {})
    decodes = features.get((line.quality, line.tier), {})
    names = [name for name, patches in decodes.items() if len(patches)]
    if len(names) > 1:
        pair = [originals[n] for n in names], [decodes[n] for n in names]
        line.add("kid", kid.statistic(*pair), len(names))


def _add_mean(
    line: Line, name: str, rows: Sequence[Row], value: Callable[[Row], float | None]
) -> None:
    """Over the pictures that have the figure; nothing where none has."""
    values = list(_by_picture(rows, value).values())
    if values:
        line.add(name, bootstrap.mean(values), len(values))


def _add_spread(
    line: Line, name: str, rows: Sequence[Row], value: Callable[[Row], float | None]
) -> None:
    """Standard deviation over a picture's seeds: the root of the mean variance over pictures."""
    own = [v for v in _seeds_of(rows, value).values() if len(v) > 1]
    if own:
        line.figures[name] = float(np.sqrt(np.mean([np.var(v, ddof=1) for v in own])))


def _by_picture(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, float]:
    """Picture -> mean over its seeds, where it has the figure."""
    return {picture: sum(v) / len(v) for picture, v in _seeds_of(rows, value).items()}


def _seeds_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[float]]:
    """Picture -> its figure at each seed that has one."""
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
