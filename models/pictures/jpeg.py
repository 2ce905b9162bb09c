"""JPEG files: checks before decoding, and truncated files."""

import io
import re

from PIL import Image

from models.errors import PictureError, UnsupportedPicture

MAX_SCANS = 1000
"""Limit on scans in a JPEG file. A scan can be as short as 14 bytes, and each takes 1 ms per
megapixel to decode. Cameras write one scan, progressive files have ten. Scans are counted by their
marker; data after the picture, such as previews, may contain some hundred more."""
_END = b"\xff\xd9"
_FILLER = b"\x5a\xa5\x36\x99" * 16
"""Arbitrary data in place of missing data. It changes the picture only if pixels are missing."""
_NOT_READ = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
             0xCB: "lossless", 0xCD: "hierarchical", 0xCE: "hierarchical",
             0xCF: "hierarchical", 0xF7: "JPEG-LS"}  # fmt: skip
"""Markers of frames (ITU-T T.81, table B.1; T.87) -> process."""
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff[\x01-\xcf\xda-\xfe]")
"""A marker in front of a segment. Others stand alone, or are part of a scan's data."""


def check(data: bytes) -> None:
    """Check a file before Pillow opens it.

    Raises `UnsupportedPicture` for processes that libjpeg does not decode, `PictureError` for too
    many scans.
    """
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise PictureError(f"the JPEG file has {scans} scans; the limit is {MAX_SCANS} scans")
    process = _NOT_READ.get(_frame(data))
    if process is not None:
        raise UnsupportedPicture(
            f"the JPEG file is {process}, which is not read; convert it to PNG"
        )


def _frame(data: bytes) -> int:
    """Return the marker of the first frame; 0 if there is none."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at : at + 1] != b"\xff" or at + 4 > len(data):
            return 0
        marker = data[at + 1]
        if marker in _FRAMES:
            return marker
        if marker == 0xFF:
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _without_cut_segment(data: bytes) -> bytes:
    """Return the file without the marker segment in which it ends, which libjpeg would wait for."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return data
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if at > len(data) or found.end() + 2 > len(data):
            return data[: found.start()]
    return data


def read_truncated(data: bytes) -> tuple[Image.Image, bool]:
    """Decode a truncated file, with grey where pixels are missing, as browsers do.

    The second value is True if only the end of the file is missing, but no pixels. In that case,
    the picture does not depend on what follows the file's last byte.
    """
    segments = _without_cut_segment(data)
    start = segments.rstrip(b"\xff")
    picture, filled = (
        Image.open(io.BytesIO(start + rest + _END), formats=["JPEG"]) for rest in (b"", _FILLER)
    )
    picture.load()
    filled.load()
    return picture, segments == data and picture.tobytes() == filled.tobytes()
