"""WebP files: repairs the sizes in their headers, and reads truncated ones."""

import struct
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from models.errors import PictureError

_PICTURES = {b"VP8 ", b"VP8L", b"ANMF"}
"""Chunks with pixels: lossy, lossless, a frame of an animation (RFC 9649)."""
_FILLERS = (b"\0", b"\0\0\1", b"\1", b"\x10", b"\x55")
"""Data in place of missing data, which changes only pixels that are missing. libwebp may refuse
some of it."""
_MAX_MISSING = 2**26
"""Limit on the bytes that are missing."""


def has_wrong_size(data: bytes) -> bool:
    """True if the file is longer or shorter than its header says."""
    return int.from_bytes(data[4:8], "little") + 8 != len(data)


def read_repaired(
    data: bytes, open_file: Callable[[bytes], Image.Image]
) -> tuple[Image.Image, bool]:
    """Decode the first picture of a truncated file; False if pixels are missing, which stay black.

    `open_file` opens the repaired file, whose header says its size. Raises `PictureError` if the
    file ends before its pixels.
    """
    body, missing = _first_picture(data)
    if not missing:
        return open_file(_file(body, _FILLERS[0], 0)), True
    decoded: list[Image.Image] = []
    for filler in _FILLERS:
        with suppress(OSError, EOFError, PictureError):
            picture = open_file(_file(body, filler, missing))
            picture.load()
            decoded.append(picture)
        if len(decoded) == 2:
            break
    else:
        raise PictureError("the WebP file is truncated: its pixels cannot be decoded")
    samples, other = (np.array(picture) for picture in decoded)
    differs = (samples != other).reshape(len(samples), -1).any(1)
    if not differs.any():
        return decoded[0], True
    samples[differs.argmax() :] = 0
    repaired = Image.fromarray(samples)
    repaired.info = decoded[0].info
    return repaired, False


def _first_picture(data: bytes) -> tuple[bytes, int]:
    """Return the chunks up to the first with pixels, and the number of bytes that it lacks.

    Metadata behind the pixels is kept if it is complete. Raises `PictureError` without pixels.
    """
    at, found, missing = 12, False, 0
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        end = at + 8 + size + size % 2
        if found and (end > len(data) or name in _PICTURES):
            break
        found = found or name in _PICTURES
        missing = max(at + 8 + size - len(data), 0)
        at = end
    if not found:
        raise PictureError("the WebP file is truncated: it has no pixels")
    if missing > _MAX_MISSING:
        raise PictureError(f"the WebP file is damaged or truncated: it lacks {missing} bytes")
    return data[12:at], missing


def _file(body: bytes, filler: bytes, missing: int) -> bytes:
    body += (filler * (missing // len(filler) + 1))[:missing]
    body += bytes(len(body) % 2)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"WEBP") + body
