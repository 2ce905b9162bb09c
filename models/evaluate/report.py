"""The Markdown of an evaluation."""

import math
from collections.abc import Iterable, Mapping, Sequence

from models.evaluate import baselines
from models.evaluate.reference_codecs import Gap
from models.evaluate.summary import Line

Titles = Mapping[str, str]
"""Figure -> heading."""

FIGURES: Titles = {
    "bpp": "bpp",
    "psnr": "PSNR",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS-Alex",
    "lpips_vgg": "LPIPS-VGG",
    "dists": "DISTS",
    "nlpd": "NLPD",
    "gmsd": "GMSD",
    "niqe": "NIQE",
    "kid": "KID",
    "seconds": "seconds",
}
"""The field's."""
JUDGED: Titles = {
    "psnr": "PSNR",
    "psnr_loss": "PSNR loss",
    "lpips": "LPIPS-Alex",
    "lpips_ratio": "LPIPS ratio",
    "niqe_gap": "NIQE gap",
    "kid": "KID",
}
"""What tiers are judged by; these have their intervals."""
OTHER: Titles = {
    "niqe_original": "NIQE of originals",
    "offset": "offset",
    "offset_max": "largest",
    "shift_max": "largest shift",
    "worse_lpips": "worse LPIPS",
    "seeds_ratio": "seeds ratio",
    "psnr_seeds": "PSNR over seeds",
    "lpips_seeds": "LPIPS over seeds",
}
RIVALS: Titles = {
    **{name: FIGURES[name] for name in ("bpp", "psnr", "ms_ssim", "lpips", "nlpd", "gmsd")},
    **{name: JUDGED[name] for name in ("niqe_gap", "kid")},
}
"""What other codecs are shown with."""
_LEGEND = """\
Means over pictures, in brackets 95 % bootstrap intervals over pictures. NIQE gap: distance of a
picture's NIQE from its original's. KID: kernel distance between patches of decodes and originals.
LPIPS ratio and PSNR loss (dB): against the instant pictures. Offset and shift: largest difference
of a colour channel's mean from the original and from the instant picture, in grey levels. Worse
LPIPS: pictures with a higher LPIPS than their instant one. Seeds ratio: MSE between seeds over that
of the instant picture. Over seeds: standard deviation of a picture's figure. Seconds: from bytes,
on the machine that made this. What was drawn of fewer pictures than the rest is on no plot.
"""
_NULLS = """\
The rows `msh+noise` and `msh+unsharp` are the instant pictures with white noise, or unsharp-masked,
each with the PSNR of the `perceptual` picture: what is no better than they are is no gain.
"""


def markdown(
    lines: Sequence[Line],
    decoder: str,
    images: Iterable[str],
    others: Sequence[Line] = (),
    gaps: Sequence[Gap] = (),
) -> str:
    """The whole report; `images` are names of files beside it, `others` other codecs."""
    parts = [f"# Evaluation of decoder {decoder}\n", table(lines, FIGURES, False), _LEGEND]
    parts += [_NULLS] if any(line.tier in baselines.NAMES for line in lines) else []
    parts += [*_missed(lines), table(lines, JUDGED, True), table(lines, OTHER, False)]
    parts += ["## Other codecs\n", table(others, RIVALS, False)] if others else []
    parts += [_equal_rate(gaps)] if gaps else []
    parts += [f"![{name}]({name})\n" for name in images]
    return "\n".join(parts)


def table(lines: Sequence[Line], titles: Titles, intervals: bool) -> str:
    """A Markdown table of the figures that any line has; a cell is empty where one lacks it."""
    names = [name for name in titles if any(name in line.figures for line in lines)]
    head = ["quality", "tier", "pictures", *(titles[name] for name in names)]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [str(line.quality), line.tier, str(line.pictures)]
        cells += [_ranged(line, n) if intervals else _number(line.figures.get(n), 4) for n in names]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _equal_rate(gaps: Sequence[Gap]) -> str:
    """A table of how far tiers are above other codecs."""
    rivals = list(dict.fromkeys(gap.rival for gap in gaps))
    db = {(gap.tier, gap.rival): f"{gap.db:+.2f}" for gap in gaps}
    out = ["| PSNR at equal rate, dB | " + " | ".join(f"over {name}" for name in rivals) + " |"]
    out += ["|---" * (1 + len(rivals)) + "|"]
    for tier in dict.fromkeys(gap.tier for gap in gaps):
        out.append(f"| {tier} | " + " | ".join(db.get((tier, name), "") for name in rivals) + " |")
    return "\n".join(out) + "\n"


def _ranged(line: Line, name: str) -> str:
    """A figure and its interval, unless that has no width."""
    text = _number(line.figures.get(name), 3)
    low, high = line.intervals.get(name, (0, 0))
    return f"{text} [{_number(low, 3)}, {_number(high, 3)}]" if high > low else text


def _number(value: float | None, digits: int) -> str:
    """So many significant digits, but two to five decimals; counts and zero as they are."""
    if value is None:
        return ""
    if value == 0 or isinstance(value, int):
        return str(int(value))
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 2), 5)}f}"


def _missed(lines: Sequence[Line]) -> list[str]:
    """A sentence for each null row that is not where it should be."""
    return [
        f"`{line.tier}` at quality {line.quality} is up to {line.figures['null_gap']:.2f} dB "
        "from the PSNR of `perceptual`: the nearest that could be had.\n"
        for line in lines
        if line.figures.get("null_gap", 0) > baselines.TOLERANCE_DB
    ]
