"""Recognises file formats by their first bytes. It imports no library."""

from collections.abc import Mapping

PNG = b"\x89PNG\r\n\x1a\n"
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
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
    (PNG, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"\xff\x0a", "JXL"),
    (JXL_CONTAINER, "JXL"),
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


def usual_name(format: str) -> str:
    """Return the name that users know for Pillow's name of a format."""
    return _NAMES.get(format, format)


def name_of(data: bytes) -> str | None:
    """Return a file's format by its first bytes; None if it is unknown.

    Formats that can be read have Pillow's name.
    """
    for start, name in _STARTS:
        if data.startswith(start):
            return name
    if data[:4] in _TIFF_STARTS:
        return "TIFF"
    if data[4:8] == b"ftyp":
        return _format_of_brands(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456fFy" and data[2:3].isspace():
        return "PPM"
    return _text_format(data)


def _text_format(data: bytes) -> str | None:
    head = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        return "SVG"
    return "HTML" if head.startswith((b"<!doctype html", b"<html")) else None


def _format_of_brands(data: bytes) -> str | None:
    """The format by the brands in box `ftyp` (ISO/IEC 14496-12, 4.3)."""
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
