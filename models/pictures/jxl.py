"""JPEG XL files, which the plugin `pillow_jxl` decodes (extra `jxl`)."""

import importlib
import io
from typing import Any

from PIL import Image

from models.errors import PictureError
from models.pictures.boxes import boxes
from models.pictures.signatures import JXL_CONTAINER

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Ratio in SizeHeader (ISO/IEC 18181-1) -> width and height."""


def size(data: bytes) -> tuple[int, int]:
    """Return width and height, read from SizeHeader (ISO/IEC 18181-1).

    The plugin decodes a file as soon as it opens it, so the size must be checked before. Raises
    `PictureError` if there is no codestream.
    """
    stream = _codestream(data) if data.startswith(JXL_CONTAINER) else data[:64]
    if stream[:2] != b"\xff\x0a":
        raise PictureError("the JPEG XL file is damaged: it has no codestream")
    bits, at = int.from_bytes(stream[2:64], "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & ((1 << count) - 1)

    small = take(1)

    def side() -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    if ratio == 0:
        return side(), height
    wide, high = _RATIOS[ratio]
    return height * wide // high, height


def _codestream(data: bytes) -> bytes:
    """Return the first bytes of the codestream in a container; empty if there is none."""
    for name, content in boxes(data):
        if name == b"jxlc":
            return content[:64]
        if name == b"jxlp":
            return content[4:68]
    return b""


def read(data: bytes) -> tuple[Image.Image, bytes | None]:
    """Decode a file: the picture and its ICC profile. libjxl applies the orientation."""
    plugin: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
    picture = plugin.JXLImageFile(io.BytesIO(data))
    picture.load()
    return picture, picture.info.get("icc_profile")
