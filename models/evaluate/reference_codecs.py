"""Other codecs' pictures, to compare rates with: JPEG, WebP and AVIF as Pillow writes them."""

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
from models.evaluate.measure import Networks, Row, compared
from models.evaluate.niqe import niqe
from models.evaluate.summary import Line
from models.image import Pixels

SETTINGS: Mapping[str, Sequence[int]] = {
    "jpeg": (5, 10, 15, 20, 30),
    "webp": (1, 5, 10, 20, 35),
    "avif": (20, 25, 30, 40, 50),
}
"""Format -> its `quality` settings, about the rates of quality 1 to 3."""
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "jpeg": {"optimize": True},
    "webp": {"method": 6},
    "avif": {"speed": 4},
}
Curve = Sequence[tuple[float, float]]
"""Points of bits per pixel and PSNR in dB."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far a tier is above a rival, in dB of PSNR at equal rate."""

    tier: str
    rival: str
    db: float


def rows(path: Path, names: Sequence[str], networks: Networks) -> list[tuple[Row, Tensor]]:
    """The picture in `path` in each format at each setting, and what it was measured on."""
    pixels = image.read(path.read_bytes(), geometry.MAX_PIXELS)
    x, of_x = codec.to_tensor(pixels), niqe(pixels)
    out = []
    for name, setting in [(n, setting) for n in names for setting in SETTINGS[n]]:
        data = encode(pixels, name, setting)
        picture = codec.to_tensor(image.read(data, geometry.MAX_PIXELS))
        row = Row(
            **compared(picture, x, networks),
            picture=path.name,
            quality=setting,
            tier=name,
            seed=0,
            bpp=8 * len(data) / (pixels.shape[0] * pixels.shape[1]),
            niqe_original=of_x,
            shift=None,
            seeds_mse=0.0,
            seconds=None,
        )
        out.append((row, picture))
    return out


def encode(pixels: Pixels, name: str, setting: int) -> bytes:
    """A file of format `name`."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, quality=setting, **_OPTIONS[name])
    return out.getvalue()


def gaps(lines: Sequence[Line], others: Sequence[Line]) -> list[Gap]:
    """Of every tier to every rival, where their rates meet; of the same number of pictures."""
    out = []
    for tier in dict.fromkeys(line.tier for line in lines):
        for rival in dict.fromkeys(line.tier for line in others):
            pictures = {line.pictures for line in (*lines, *others) if line.tier in (tier, rival)}
            db = gap(_curve(lines, tier), _curve(others, rival)) if len(pictures) == 1 else None
            out += [Gap(tier, rival, db)] if db is not None else []
    return out


def gap(own: Curve, other: Curve) -> float | None:
    """Mean of own - other in dB over the rates that both cover; None where there are none.

    Both are linear in the logarithm of the rate between their points.
    """
    if not own or not other:
        return None
    (r, a), (s, b) = (np.array(sorted(curve)).T for curve in (own, other))
    r, s = np.log(r), np.log(s)
    low, high = max(r[0], s[0]), min(r[-1], s[-1])
    if low > high:
        return None
    at = np.unique(np.clip(np.concatenate([r, s]), low, high))
    apart = np.interp(at, r, a) - np.interp(at, s, b)
    if low == high:
        return float(apart[0])
    return float((apart[1:] + apart[:-1]) / 2 @ np.diff(at) / (high - low))


def _curve(lines: Sequence[Line], tier: str) -> Curve:
    own = [line.figures for line in lines if line.tier == tier]
    return [(figures["bpp"], figures["psnr"]) for figures in own if "psnr" in figures]
