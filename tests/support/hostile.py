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


def strip_offsets(count: int = 50_000) -> bytes:
    """A black and white TIFF of 0.5 MB with two strips, which are listed again and again."""
    width, rows = 2000, 1000
    strip = bytes(width * rows // 8)
    directory = 8 + len(strip)
    table = directory + 2 + 8 * 12 + 4
    entries = (
        (256, 4, 1, width), (257, 4, 1, 2 * rows), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, count, table), (277, 3, 1, 1), (278, 4, 1, rows),
    )  # fmt: skip
    return b"".join(
        (
            b"II*\0" + struct.pack("<I", directory) + strip,
            struct.pack("<H", len(entries)),
            *(struct.pack("<HHII", *entry) for entry in entries),
            bytes(4),
            struct.pack("<I", 8) * count,
        )
    )


FILES = {
    "comment lines": comments,
    "Exif segments": exif_segments,
    "strip offsets": strip_offsets,
}
