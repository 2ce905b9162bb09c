"""BMP files with bit fields that Pillow does not read."""

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import PictureError
from models.geometry import check_size

_BITFIELDS, _ALPHA_BITFIELDS = 3, 6
_KNOWN = {
    (16, (0xF800, 0x7E0, 0x1F, 0)),
    (16, (0x7C00, 0x3E0, 0x1F, 0)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0)),
}
"""Bits per pixel, and masks of red, green, blue and alpha, which Pillow reads faster."""


def read_fields(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode a BMP file of 16 or 32 bits with masks to RGB or RGBA; None for all others.

    Raises `PictureError` if pixels are missing, `PictureTooLarge` for more than `max_pixels`.
    """
    if len(data) < 54:
        return None
    offset, header = struct.unpack_from("<II", data, 10)
    width, height, _, bits, method = struct.unpack_from("<iiHHI", data, 18)
    if method not in {_BITFIELDS, _ALPHA_BITFIELDS} or bits not in {16, 32} or header < 40:
        return None
    with_alpha = header >= 56 or method == _ALPHA_BITFIELDS
    masks = struct.unpack("<4I", data[54:70].ljust(16, b"\0"))
    masks = (*masks[:3], masks[3] if with_alpha else 0)
    if (bits, masks) in _KNOWN or not all(masks[:3]):
        return None
    check_size(abs(height), width, max_pixels)
    row = (width * bits + 31) // 32 * 4
    if len(data) < offset + row * abs(height):
        raise PictureError("the BMP file is truncated: pixels are missing")
    rows = np.frombuffer(data, np.uint8, row * abs(height), offset).reshape(abs(height), row)
    values = np.ascontiguousarray(rows[:, : width * bits // 8]).view(f"<u{bits // 8}")
    if height > 0:
        values = values[::-1]
    channels = [_channel(values.astype(np.uint32), mask) for mask in masks if mask]
    return Image.fromarray(np.stack(channels, -1))


def _channel(values: NDArray[np.uint32], mask: int) -> NDArray[np.uint8]:
    """Extract the bits of a mask and stretch them to 0…255."""
    shift = (mask & -mask).bit_length() - 1
    top = mask >> shift
    scaled = ((values & np.uint32(mask)) >> np.uint32(shift)) * (255.0 / top)
    channel: NDArray[np.uint8] = np.round(scaled).astype(np.uint8)
    return channel
