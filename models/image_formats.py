"""Which picture format a file has, and why it is not read."""

import importlib.util
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from models import text_bodies
from models.errors import PictureError, UnsupportedPicture

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
"""Formats that are always read: those whose size is known before their pixels are decoded."""
_NAMES = {"WEBP": "WebP", "PPM": "PNM", "JXL": "JPEG XL"}
"""Pillow's name -> usual name, where they differ."""
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "HEIC": ("pi_heif", "heic"),
    "JXL": ("pillow_jxl", "jxl"),
}
"""Format -> module that reads it, and the extra of this package that installs the module."""
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "PSD (Photoshop)"),
    (b"%PDF", "PDF"),
    (b"%!PS", "EPS or PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS or PostScript"),
    (b"IIU\0", "camera raw (Panasonic)"),
    (b"IIRO", "camera raw (Olympus)"),
    (b"IIRS", "camera raw (Olympus)"),
    (b"MMOR", "camera raw (Olympus)"),
    (b"FUJIFILMCCD-RAW", "camera raw (Fujifilm)"),
    (b"FOVb", "camera raw (Sigma)"),
    (b"\0MRM", "camera raw (Minolta)"),
    (b"II*\0\x10\0\0\0CR", "camera raw (Canon)"),
    (b"II\x1a\0\0\0HEAPCCDR", "camera raw (Canon)"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"gimp xcf", "XCF (GIMP)"),
    (b"qoif", "QOI"),
    (b"P7\n", "PAM"),
    (b"farbfeld", "farbfeld"),
    (b"SIMPLE  =", "FITS"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\x02\0", "CUR"),
    (b"icns", "ICNS"),
    (b"AT&TFORM", "DjVu"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\x93NUMPY", "NPY"),
    (b"\x8dMSH", "MSH (a bitstream, to be decoded)"),
    (b"\x1aE\xdf\xa3", "WebM or Matroska video"),
)  # fmt: skip
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_VIDEO_BRANDS = {b"isom", b"mp42", b"mp41", b"qt  ", b"M4V ", b"iso2", b"iso5", b"iso6"}
_BRANDS = 64
"""Bytes of box `ftyp` that are searched for the format."""


def name_of(data: bytes) -> str | None:
    """Return a file's format by its first bytes, as Pillow names it if it is read; None if the
    format is not known."""
    for start, name in _STARTS:
        if data.startswith(start):
            return name
    if data[:4] in _TIFF_STARTS:
        return "TIFF"
    if data[4:8] == b"ftyp":
        return _of_brands(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456fFy" and data[2:3].isspace():
        return "PPM"
    return _of_text(data)


def _of_text(data: bytes) -> str | None:
    head = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        return "SVG"
    return "HTML" if head.startswith((b"<!doctype html", b"<html")) else None


def _of_brands(data: bytes) -> str | None:
    size = min(int.from_bytes(data[:4], "big"), _BRANDS)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, size, 4))}
    if data[8:12] == b"crx ":
        return "camera raw (Canon)"
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & _HEIC_BRANDS:
        return "HEIC"
    if data[8:12] in _VIDEO_BRANDS:
        return "MP4 or QuickTime video"
    return "HEIF (with another codec than AV1 or HEVC)" if brands & {b"mif1", b"msf1"} else None


def readable() -> list[str]:
    """Return the usual names of the formats that this installation reads."""
    installed = [name for name, (module, _) in OPTIONAL.items() if importlib.util.find_spec(module)]
    return [_NAMES.get(name, name) for name in (*FORMATS, *installed)]


def usual_name(format: str) -> str:
    return _NAMES.get(format, format)


def check(data: bytes) -> str:
    """Return the format of a file that may be read. Raises `UnsupportedPicture` for others."""
    name = name_of(data)
    if name in FORMATS:
        return name
    use = f"use {', '.join(readable())}"
    if name is None:
        use = text_bodies.advice(data) or use
        raise UnsupportedPicture(f"the file is no picture in a known format; {use}")
    if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name][0]):
        return name
    if name in OPTIONAL:
        use = f"install afterimage[{OPTIONAL[name][1]}] on the server, or {use}"
    raise UnsupportedPicture(f"the file's format is {usual_name(name)}, which is not read; {use}")


def open_file(data: bytes, format: str) -> ImageFile.ImageFile:
    """Open a file of one of `FORMATS` without decoding its pixels.

    Raises `UnsupportedPicture` for a variant that Pillow does not read, `PictureError` for a
    broken file, each with Pillow's reason.
    """
    try:
        return Image.open(io.BytesIO(data), formats=[format])
    except Image.DecompressionBombError:
        raise
    except UnidentifiedImageError:
        reason = _hidden_reason(data, format)
    except Exception as e:  # readers raise many kinds of errors
        reason = str(e)
    name = usual_name(format)
    if format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        reason = "it is truncated"
    if any(words in reason.lower() for words in _VARIANT):
        raise UnsupportedPicture(
            f"the {name} file is of a kind that is not read: {reason}; convert it to PNG"
        )
    raise PictureError(f"the {name} file is damaged and cannot be read: {reason}")


def _hidden_reason(data: bytes, format: str) -> str:
    """`Image.open` hides why a reader refuses a file; the reader itself tells it."""
    opener: Any = Image.OPEN[format][0]
    try:
        opener(io.BytesIO(data), "")
    except Exception as e:
        return str(e) or type(e).__name__
    return "its header cannot be read"


_VARIANT = ("unsupported", "unknown pixel mode", "cannot handle", "not implemented", "unrecognized")
"""Pillow's reasons that are about a valid variant, rather than about damage."""
