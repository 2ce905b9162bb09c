"""Reference codecs to compare rates with: JPEG, WebP and AVIF, encoded by Pillow.

The option `--rivals` chooses them. Reports call them other codecs.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models import geometry, image
from models.codec import codec
from models.evaluate.measure import DecodeMetrics, Networks, compare
from models.evaluate.niqe import niqe
from models.evaluate.summary import SummaryLine
from models.image import Pixels

SETTINGS: Mapping[str, Sequence[int]] = {
    "jpeg": (5, 10, 15, 20, 30),
    "webp": (1, 5, 10, 20, 35),
    "avif": (20, 25, 30, 40, 50),
}
"""Format -> `quality` settings of Pillow, with about the rates of the codec's qualities 1 to 3."""
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "jpeg": {"optimize": True},
    "webp": {"method": 6},
    "avif": {"speed": 4},
}
Curve = Sequence[tuple[float, float]]
"""Points (bits per pixel, PSNR in dB)."""


@dataclass(frozen=True, slots=True)
class Gap:
    """PSNR of a tier minus PSNR of a reference codec at equal rate, in dB."""

    tier: str
    rival: str
    db: float


def rows(
    path: Path, names: Sequence[str], networks: Networks
) -> list[tuple[DecodeMetrics, Tensor]]:
    """Encode the picture in `path` in each format at each setting; return metrics and decodes."""
    pixels = image.read(path.read_bytes(), geometry.MAX_PIXELS)
    x, niqe_original = codec.to_tensor(pixels), niqe(pixels)
    out = []
    for name, setting in [(n, setting) for n in names for setting in SETTINGS[n]]:
        data = encode(pixels, name, setting)
        picture = codec.to_tensor(image.read(data, geometry.MAX_PIXELS))
        row = DecodeMetrics(
            **compare(picture, x, networks),
            picture=path.name,
            quality=setting,
            tier=name,
            seed=0,
            bpp=8 * len(data) / (pixels.shape[0] * pixels.shape[1]),
            niqe_original=niqe_original,
            shift=None,
            seeds_mse=0.0,
            seconds=None,
        )
        out.append((row, picture))
    return out


def encode(pixels: Pixels, name: str, setting: int) -> bytes:
    """Encode in the format `name`; return the file's bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, quality=setting, **_OPTIONS[name])
    return out.getvalue()


def gaps(lines: Sequence[SummaryLine], others: Sequence[SummaryLine]) -> list[Gap]:
    """Return the gap of each tier to each reference codec.

    Pairs whose rates do not overlap, or whose numbers of pictures differ, are left out.
    """
    out = []
    for tier in dict.fromkeys(line.tier for line in lines):
        for rival in dict.fromkeys(line.tier for line in others):
            pictures = {line.pictures for line in (*lines, *others) if line.tier in (tier, rival)}
            db = gap(_curve(lines, tier), _curve(others, rival)) if len(pictures) == 1 else None
            out += [Gap(tier, rival, db)] if db is not None else []
    return out


def gap(curve: Curve, other: Curve) -> float | None:
    """Mean of `curve` - `other` in dB over the rates that both cover; None if there are none.

    Between its points a curve is linear in the logarithm of the rate.
    """
    if not curve or not other:
        return None
    (r, a), (s, b) = (np.array(sorted(points)).T for points in (curve, other))
    r, s = np.log(r), np.log(s)
    low, high = max(r[0], s[0]), min(r[-1], s[-1])
    if low > high:
        return None
    at = np.unique(np.clip(np.concatenate([r, s]), low, high))
    difference = np.interp(at, r, a) - np.interp(at, s, b)
    if low == high:
        return float(difference[0])
    return float((difference[1:] + difference[:-1]) / 2 @ np.diff(at) / (high - low))


def _curve(lines: Sequence[SummaryLine], tier: str) -> Curve:
    of_tier = [line.figures for line in lines if line.tier == tier]
    return [(figures["bpp"], figures["psnr"]) for figures in of_tier if "psnr" in figures]
