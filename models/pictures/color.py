"""Convert colours to sRGB, given as primaries and curves, as codes, or as an ICC profile.

The codes are those of ITU-T H.273 ("CICP"), which PNG (chunk cICP), AVIF and HEIC (box colr) use.
"""

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from models.errors import UnsupportedPicture

Floats = NDArray[np.float64]
Curve = Callable[[Floats], Floats]
"""Encoded value in 0…1 -> linear light."""
_ROWS = 256
"""Rows that are converted at a time, which limits the memory for floating-point values."""


@dataclass(frozen=True, slots=True)
class Colour:
    """The colour space of a picture's RGB samples."""

    curves: tuple[Curve, Curve, Curve]
    matrix: Floats  # (3, 3): linear RGB -> linear sRGB
    full_range: bool = True  # False: black is 16/255 and white is 235/255


D65 = (0.3127, 0.3290)
PRIMARIES: Mapping[int, tuple[float, ...]] = {
    1: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *D65),
    4: (0.670, 0.330, 0.210, 0.710, 0.140, 0.080, 0.310, 0.316),
    5: (0.640, 0.330, 0.290, 0.600, 0.150, 0.060, *D65),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65),
    10: (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1 / 3, 1 / 3),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *D65),
}
"""H.273, table 2: code -> x and y of red, green, blue and white."""
_REFUSED = {
    9: "a logarithmic curve",
    10: "a logarithmic curve",
    16: "PQ (HDR, SMPTE ST 2084)",
    18: "HLG (HDR, ARIB STD-B67)",
}
"""H.273, table 3: transfer functions that are not converted."""
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
"""XYZ -> cone responses (ICC.1:2022, annex E)."""
_D50 = np.array([0.9642, 1.0, 0.8249])
"""White of the profile connection space (ICC.1:2022, 7.2.16)."""


def srgb_curve(x: Floats) -> Floats:
    """IEC 61966-2-1, 5.2."""
    linear: Floats = np.where(x <= 0.04045, x / 12.92, ((np.maximum(x, 0) + 0.055) / 1.055) ** 2.4)
    return linear


def gamma_curve(x: Floats, exponent: float) -> Floats:
    """x to the power of `exponent`."""
    linear: Floats = np.maximum(x, 0) ** exponent
    return linear


def _smpte240_curve(x: Floats) -> Floats:
    """H.273, table 3, code 7."""
    linear: Floats = np.where(
        x < 0.0913, x / 4, ((np.maximum(x, 0) + 0.1115) / 1.1115) ** (1 / 0.45)
    )
    return linear


def _cinema_curve(x: Floats) -> Floats:
    """H.273, table 3, code 17 (SMPTE ST 428-1)."""
    return gamma_curve(x, 2.6) * (52.37 / 48)


_CURVES: Mapping[int, Curve] = {
    4: partial(gamma_curve, exponent=2.2),
    5: partial(gamma_curve, exponent=2.8),
    7: _smpte240_curve,
    8: partial(gamma_curve, exponent=1.0),
    17: _cinema_curve,
}
"""H.273, table 3. All other codes count as sRGB: the curves of BT.601, BT.709 and BT.2020 describe
cameras, and browsers show such pictures with sRGB's curve."""


def from_codes(primaries: int, transfer: int, full_range: bool = True) -> Colour | None:
    """Return the colours for two codes of H.273; None for sRGB and for unknown codes.

    Raises `UnsupportedPicture` for the HDR curves PQ and HLG, and for logarithmic curves.
    """
    if transfer in _REFUSED:
        raise UnsupportedPicture(
            f"the picture's colours have {_REFUSED[transfer]}, which is not read; "
            "convert the picture to sRGB or Display P3"
        )
    curve = _CURVES.get(transfer, srgb_curve)
    points = PRIMARIES.get(primaries, PRIMARIES[1])
    if curve is srgb_curve and points == PRIMARIES[1] and full_range:
        return None
    return Colour((curve, curve, curve), _to_srgb_matrix(points), full_range)


def from_gamma(gamma: float | None, chromaticities: tuple[float, ...] | None) -> Colour | None:
    """Return the colours for a PNG's gAMA and cHRM; None if they are close to sRGB or impossible.

    `gamma` is the encoding exponent, such as 1/2.2. If it is missing or, as in libpng, less than
    5 % from 1/2.2, the curve is sRGB's.
    """
    curve: Curve = srgb_curve
    if gamma and abs(gamma * 2.2 - 1) > 0.05:
        curve = partial(gamma_curve, exponent=1 / gamma)
    points = chromaticities or PRIMARIES[1]
    if max(abs(a - b) for a, b in zip(points, PRIMARIES[1], strict=True)) < 0.002:
        points = PRIMARIES[1]
    if curve is srgb_curve and points == PRIMARIES[1]:
        return None
    try:
        with np.errstate(all="ignore"):
            matrix = _to_srgb_matrix(points)
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return None
    return Colour((curve, curve, curve), matrix) if np.isfinite(matrix).all() else None


def from_profile(profile: bytes) -> Colour | None:
    """Return the colours of an ICC profile that consists of curves and a matrix; None for others.

    It serves samples of 16 bits: Pillow gives littleCMS, which applies profiles, only 8 bits. The
    one curve of a grey profile is used for all channels.
    """
    try:
        tags = _profile_tags(profile)
        if tags.keys() & {b"A2B0", b"A2B1", b"D2B0", b"D2B1"} or profile[20:24] != b"XYZ ":
            return None
        if profile[16:20] == b"GRAY":
            grey = _profile_curve(tags[b"kTRC"])
            return Colour((grey, grey, grey), np.eye(3))
        red, green, blue = (_profile_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
        columns = [struct.unpack(">3i", tags[n][8:20]) for n in (b"rXYZ", b"gXYZ", b"bXYZ")]
        matrix = np.linalg.inv(_srgb_at_d50()) @ (np.array(columns).T / 65536)
        return Colour((red, green, blue), matrix)
    except (KeyError, ValueError, IndexError, ZeroDivisionError, struct.error):
        return None


def _profile_tags(profile: bytes) -> dict[bytes, bytes]:
    """ICC.1:2022, 7.3: the tags' names -> their contents."""
    count = min(int.from_bytes(profile[128:132], "big"), 100)
    tags = {}
    for at in range(132, 132 + 12 * count, 12):
        name, start, size = struct.unpack(">4sII", profile[at : at + 12])
        tags[name] = profile[start : start + size]
    return tags


def _profile_curve(tag: bytes) -> Curve:
    """Parse a curve (ICC.1:2022, 10.6 curv, 10.18 para). Raises `ValueError` for other types."""
    if tag[:4] == b"curv":
        count = int.from_bytes(tag[8:12], "big")
        values = np.frombuffer(tag[12 : 12 + 2 * count], ">u2").astype(np.float64)
        if len(values) != count:
            raise ValueError("the curve ends early")
        if count <= 1:
            return partial(gamma_curve, exponent=values[0] / 256 if count else 1.0)
        return partial(np.interp, xp=np.linspace(0, 1, count), fp=values / 65535)
    kind = int.from_bytes(tag[8:10], "big")
    if tag[:4] != b"para" or kind > 4:
        raise ValueError("unknown kind of curve")
    values = np.frombuffer(tag[12 : 12 + 4 * (1, 3, 4, 5, 7)[kind]], ">i4") / 65536
    g, a, b, c, d, e, f = [float(v) for v in values] + [0.0] * (7 - len(values))
    if kind == 0:
        return partial(gamma_curve, exponent=g)
    if kind < 3:  # d is where a*x + b becomes positive; below it the curve is c
        d, c, e, f = -b / a, 0.0, c, c
    return partial(_parametric, g=g, a=a, b=b, c=c, d=d, e=e, f=f)


def _parametric(
    x: Floats, g: float, a: float, b: float, c: float, d: float, e: float, f: float
) -> Floats:
    linear: Floats = np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)
    return linear


def to_srgb(samples: NDArray[np.uint8] | NDArray[np.uint16], colour: Colour) -> NDArray[np.uint8]:
    """Convert `samples` (H, W, 3) of 8 or 16 bits to sRGB (H, W, 3) of 8 bits."""
    top = np.iinfo(samples.dtype).max
    codes = np.arange(top + 1) / top
    if not colour.full_range:
        codes = (codes * 255 - 16) / 219
    with np.errstate(all="ignore"):
        linear = [
            np.nan_to_num(curve(codes), posinf=1).astype(np.float32) for curve in colour.curves
        ]
    matrix = colour.matrix.T.astype(np.float32)
    encode = _srgb_codes()
    out = np.empty(samples.shape, np.uint8)
    for start in range(0, len(samples), _ROWS):
        rows = samples[start : start + _ROWS]
        light = np.stack([linear[i][rows[..., i]] for i in range(3)], -1) @ matrix
        index = np.clip(light, 0, 1) * np.float32(len(encode) - 1) + np.float32(0.5)
        out[start : start + _ROWS] = encode[index.astype(np.int32)]
    return out


def apply_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    """Convert a picture of mode RGB, L or CMYK to sRGB; a broken profile changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):  # ignore a profile that is broken or of another mode
        return picture
    return picture if converted is None else converted


@cache
def _srgb_codes() -> NDArray[np.uint8]:
    """Linear light in 1/65535 -> sRGB in 8 bits (IEC 61966-2-1, 5.2)."""
    x = np.arange(65536) / 65535
    encoded = np.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055)
    codes: NDArray[np.uint8] = np.round(encoded * 255).astype(np.uint8)
    return codes


def _to_xyz(points: tuple[float, ...]) -> Floats:
    """Linear RGB -> XYZ (SMPTE RP 177). Raises `ZeroDivisionError` or `LinAlgError`."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in _pairs(points)]).T
    primaries, white = columns[:, :3], columns[:, 3]
    return np.asarray(primaries * np.linalg.solve(primaries, white), np.float64)


def _pairs(points: tuple[float, ...]) -> list[tuple[float, float]]:
    """Pairs of x and y. A primary may have y = 0, as those of XYZ; white may not."""
    if points[7] == 0:
        raise ZeroDivisionError("a white without light")
    return [(x, y or 1e-9) for x, y in zip(points[::2], points[1::2], strict=True)]


def _adapt(white: Floats, target: Floats) -> Floats:
    """XYZ at `white` -> XYZ at `target` (Bradford's method, ICC.1:2022, annex E)."""
    scale = (_BRADFORD @ target) / (_BRADFORD @ white)
    matrix: Floats = np.linalg.inv(_BRADFORD) @ (scale[:, None] * _BRADFORD)
    return matrix


def _to_srgb_matrix(points: tuple[float, ...]) -> Floats:
    """Linear RGB of these primaries -> linear sRGB; white stays white."""
    source, srgb = _to_xyz(points), _to_xyz(PRIMARIES[1])
    matrix: Floats = np.linalg.inv(srgb) @ _adapt(source.sum(1), srgb.sum(1)) @ source
    return matrix


def _srgb_at_d50() -> Floats:
    srgb = _to_xyz(PRIMARIES[1])
    return _adapt(srgb.sum(1), _D50) @ srgb
