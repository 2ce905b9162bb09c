"""Small picture files that take a very long time to read."""

import io
import struct

from PIL import Image


def comments(megabytes: float = 4) -> bytes:
    """A plain PPM whose pixels stand behind comment lines: many seconds a megabyte."""
    return b"P3 1 1 255\n" + b"#\n" * int(megabytes * 2**19) + b"1 2 3\n"


def exif_segments(count: int = 160_000) -> bytes:
    """A JPEG of 4 MB with many Exif segments, each of which is joined to all former ones."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    segment = b"Exif\0\0" + bytes(15)
    marker = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return out.getvalue()[:2] + marker * count + out.getvalue()[2:]


FILES = {
    "comment lines": comments,
    "Exif segments": exif_segments,
}
