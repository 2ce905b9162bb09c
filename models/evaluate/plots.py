"""Plots of an evaluation: rate, distortion, perception and calibration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.evaluate import baselines, reference_codecs
from models.evaluate.calibration import Point
from models.evaluate.measure import SHUFFLED
from models.evaluate.summary import SummaryLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import LayoutEngine

RATE = {
    "psnr": "PSNR in dB  ↑",
    "ms_ssim": "MS-SSIM  ↑",
    "lpips": "LPIPS-Alex  ↓",
    "lpips_vgg": "LPIPS-VGG  ↓",
    "dists": "DISTS  ↓",
    "nlpd": "NLPD  ↓",
    "gmsd": "GMSD  ↓",
    "niqe_gap": "|NIQE − original's|  ↓",
    "kid": "KID  ↓",
}
PERCEPTION = ("lpips", "niqe_gap", "kid")
_COLOURS = tuple(f"C{i}" for i in range(10))
"""Matplotlib's names of its ten default colours."""
_GREY = "0.55"
_LINE_STYLES = dict(zip(reference_codecs.SETTINGS, (":", "--", "-"), strict=True))
"""Other codec -> line style."""
_LABELS = 8
"""Most labels per row of the legend."""
_LABEL_GAP = 0.062
"""Smallest distance of two labels, as a fraction of the axis."""


def rate(lines: Sequence[SummaryLine], file: Path, others: Sequence[SummaryLine] = ()) -> None:
    """Plot each metric over bpp, with a line per tier and per other codec, into a PNG."""
    lines = [*lines, *others]
    names = _available(lines, tuple(RATE))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(4.4 * columns, 3.3 * rows + 0.6)
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(all_axes, names, strict=False):
        for tier in dict.fromkeys(line.tier for line in lines):
            figures = [li.figures for li in lines if li.tier == tier and name in li.figures]
            bpp, values = [f["bpp"] for f in figures], [f[name] for f in figures]
            axes.plot(bpp, values, label=tier, **_style(tier, lines))
        _label_axes(axes, "bits per pixel", RATE[name])
    for axes in all_axes[len(names) :]:
        axes.remove()
    handles, labels = all_axes[0].get_legend_handles_labels()
    columns = -(-len(labels) // -(-len(labels) // _LABELS))  # rows of equal length
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=120)


def perception(lines: Sequence[SummaryLine], file: Path) -> None:
    """Plot perceptual metrics over PSNR, a point per tier and a row per quality, into a PNG."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = _available(lines, PERCEPTION)
    qualities = list(dict.fromkeys(line.quality for line in lines))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = _figure(4.8 * len(names), 3.8 * len(qualities), layout)
    grid = figure.subplots(len(qualities), len(names), squeeze=False)
    for quality, row in zip(qualities, grid, strict=True):
        for axes, name in zip(row, names, strict=True):
            _points(axes, [line for line in lines if line.quality == quality], name, lines)
            axes.set_title(f"quality {quality}", loc="left", fontsize=9, color="0.3")
            _label_axes(axes, RATE["psnr"], RATE[name])
    figure.savefig(file, dpi=120)


def calibration(curves: Mapping[int, Sequence[Point]], file: Path) -> None:
    """Plot the predicted (line) and actual (dots) error of x0 over t, per quality, into a PNG."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for (quality, points), colour in zip(sorted(curves.items()), _COLOURS, strict=False):
        times = [p.t for p in points]
        axes.plot(times, [p.predicted for p in points], color=colour, label=f"quality {quality}")
        axes.plot(times, [p.actual for p in points], "o", color=colour, markersize=4.5)
        axes.axhline(points[0].zero, color=colour, linestyle=":", linewidth=1)
    axes.plot([], [], color="0.4", label="predicted")
    axes.plot([], [], "o", color="0.4", markersize=4.5, label="actual")
    axes.plot([], [], ":", color="0.4", linewidth=1, label="of x0 = 0")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)
    _label_axes(axes, "time t (0: picture, 1: noise)", "mean squared error of x0")
    figure.savefig(file, dpi=120)


def _figure(
    width: float, height: float, layout: "LayoutEngine | Literal['constrained']" = "constrained"
) -> "Figure":
    """An empty figure; sides in inches. Matplotlib takes a second to import, so it is done here."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _points(
    axes: "Axes", at_quality: Sequence[SummaryLine], name: str, lines: Sequence[SummaryLine]
) -> None:
    points = [line for line in at_quality if {"psnr", name} <= line.figures.keys()]
    for line in points:
        style = _style(line.tier, lines) | {"linestyle": "none"}
        axes.plot(line.figures["psnr"], line.figures[name], **style)
    axes.margins(x=0.12, y=0.15)
    colours = [_style(line.tier, lines)["color"] for line in points]
    labels = [(line.figures["psnr"], line.figures[name], line.tier) for line in points]
    _label_points(axes, labels, colours)


def _label_points(
    axes: "Axes", points: Sequence[tuple[float, float, str]], colours: Sequence[Any]
) -> None:
    """Write the names in a column at the right, ordered by height, with a line to each point."""
    axes.set_xlim(axes.get_xlim())
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = _spread([(y - low) / (high - low) for _, y, _ in points])
    for (x, y, tier), height, colour in zip(points, heights, colours, strict=True):
        axes.annotate(
            tier,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """Move heights at least `_LABEL_GAP` apart, in the same order and below 1."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    out = list(heights)
    floor = 0.0
    for i in order:
        out[i] = floor = max(out[i], floor)
        floor += _LABEL_GAP
    ceiling = 1.0
    for i in reversed(order):
        out[i] = ceiling = min(out[i], ceiling)
        ceiling -= _LABEL_GAP
    return out


def _style(tier: str, lines: Sequence[SummaryLine]) -> dict[str, Any]:
    """Line style: colours for tiers, grey for baselines, controls and other codecs."""
    if tier in _LINE_STYLES:
        return {"color": "0.7", "linestyle": _LINE_STYLES[tier], "zorder": 1.2, "linewidth": 1.2}
    if tier in (*baselines.NAMES, SHUFFLED):
        marker = {baselines.NAMES[0]: "x", baselines.NAMES[1]: "+", SHUFFLED: "1"}[tier]
        grey = {"color": _GREY, "linestyle": ":", "zorder": 1.5}  # behind the tiers
        return grey | {"marker": marker, "markersize": 7}
    tiers = dict.fromkeys(line.tier for line in lines)
    in_colour = [t for t in tiers if t not in (*baselines.NAMES, SHUFFLED, *_LINE_STYLES)]
    colour = _COLOURS[in_colour.index(tier) % len(_COLOURS)]
    return {"color": colour, "marker": "o", "markersize": 5.5, "linestyle": "-"}


def _available(lines: Sequence[SummaryLine], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in line.figures for line in lines)]


def _label_axes(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
