"""Markdown report of an evaluation."""

import math
from collections.abc import Iterable, Mapping, Sequence

from models.evaluate import baselines
from models.evaluate.reference_codecs import Gap
from models.evaluate.summary import SummaryLine

Titles = Mapping[str, str]
"""Figure -> column heading."""

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
"""Columns of the first table: the usual metrics."""
CRITERIA: Titles = {
    "psnr": "PSNR",
    "psnr_loss": "PSNR loss",
    "lpips": "LPIPS-Alex",
    "lpips_ratio": "LPIPS ratio",
    "niqe_gap": "NIQE gap",
    "kid": "KID",
}
"""Columns of the second table, with confidence intervals: the criteria for tiers."""
DIAGNOSTICS: Titles = {
    "niqe_original": "NIQE of originals",
    "offset": "offset",
    "offset_max": "largest offset",
    "shift_max": "largest shift",
    "worse_lpips": "worse LPIPS",
    "seeds_ratio": "seeds ratio",
    "psnr_seeds": "PSNR over seeds",
    "lpips_seeds": "LPIPS over seeds",
}
"""Columns of the third table."""
OTHER_CODECS: Titles = {
    **{name: FIGURES[name] for name in ("bpp", "psnr", "ms_ssim", "lpips", "nlpd", "gmsd")},
    **{name: CRITERIA[name] for name in ("niqe_gap", "kid")},
}
"""Columns of the table of other codecs."""
_LEGEND = """\
Values are means over the pictures; brackets hold 95 % confidence intervals from a bootstrap over
pictures. The plots leave out tiers that were measured on fewer pictures than the others.

- PSNR (dB) and MS-SSIM: higher is better. LPIPS, DISTS, NLPD and GMSD: lower is better.
- NIQE: best when close to the NIQE of the original. NIQE gap: the absolute difference of the two.
- KID: kernel distance between patches of the decodes and of the originals; lower is better.
- PSNR loss (dB) and LPIPS ratio: relative to the instant picture.
- Seconds: from the bytes to the picture, on the machine of this evaluation.
- Offset and shift: largest difference between the means of a colour channel, in 1/255, relative to
  the original and to the instant picture.
- Worse LPIPS: number of pictures whose LPIPS is higher than that of their instant picture.
- Seeds ratio: MSE between pictures of two seeds, divided by the MSE of the instant picture.
- PSNR and LPIPS over seeds: standard deviation over the seeds of a picture.
"""
_BASELINES = """\
`msh+noise` and `msh+unsharp` are baselines: the instant picture with white noise or an unsharp
mask, with the same PSNR as the `perceptual` picture. A tier that does not beat them is no
improvement.
"""


def markdown(
    lines: Sequence[SummaryLine],
    decoders: Sequence[str],
    images: Iterable[str],
    others: Sequence[SummaryLine] = (),
    gaps: Sequence[Gap] = (),
) -> str:
    """The report; `images` are file names in the same folder, `others` the other codecs."""
    title = f"# Evaluation of decoder{'s'[: len(decoders) - 1]} {', '.join(decoders)}\n"
    parts = [title, table(lines, FIGURES, False), _LEGEND]
    parts += [_BASELINES] if any(line.tier in baselines.NAMES for line in lines) else []
    parts += [
        *_missed_baselines(lines),
        table(lines, CRITERIA, True),
        table(lines, DIAGNOSTICS, False),
    ]
    parts += ["## Other codecs\n", table(others, OTHER_CODECS, False)] if others else []
    parts += [_equal_rate(gaps)] if gaps else []
    parts += [f"![{name}]({name})\n" for name in images]
    return "\n".join(parts)


def table(lines: Sequence[SummaryLine], titles: Titles, intervals: bool) -> str:
    """A Markdown table of `titles`, without columns that no line has; missing cells are empty."""
    names = [name for name in titles if any(name in line.figures for line in lines)]
    head = ["quality", "tier", "pictures", *(titles[name] for name in names)]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [str(line.quality), line.tier, str(line.pictures)]
        cells += [
            _with_interval(line, n) if intervals else _number(line.figures.get(n), 4) for n in names
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _equal_rate(gaps: Sequence[Gap]) -> str:
    """A table of the PSNR of tiers minus that of other codecs."""
    rivals = list(dict.fromkeys(gap.rival for gap in gaps))
    db = {(gap.tier, gap.rival): f"{gap.db:+.2f}" for gap in gaps}
    out = ["| PSNR at equal rate, dB | " + " | ".join(f"over {name}" for name in rivals) + " |"]
    out += ["|---" * (1 + len(rivals)) + "|"]
    for tier in dict.fromkeys(gap.tier for gap in gaps):
        out.append(f"| {tier} | " + " | ".join(db.get((tier, name), "") for name in rivals) + " |")
    return "\n".join(out) + "\n"


def _with_interval(line: SummaryLine, name: str) -> str:
    """A figure, followed by its interval unless that is a single value."""
    text = _number(line.figures.get(name), 3)
    low, high = line.intervals.get(name, (0, 0))
    return f"{text} [{_number(low, 3)}, {_number(high, 3)}]" if high > low else text


def _number(value: float | None, digits: int) -> str:
    """Format with `digits` significant digits, but 2 to 5 decimals; integers without decimals."""
    if value is None:
        return ""
    if value == 0 or isinstance(value, int):
        return str(int(value))
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 2), 5)}f}"


def _missed_baselines(lines: Sequence[SummaryLine]) -> list[str]:
    """A sentence for each baseline whose PSNR differs from that of `perceptual`."""
    return [
        f"`{line.tier}` at quality {line.quality} misses the PSNR of `perceptual` by up to "
        f"{line.figures['null_gap']:.2f} dB; no amplitude comes closer.\n"
        for line in lines
        if line.figures.get("null_gap", 0) > baselines.TOLERANCE_DB
    ]
