"""Write pixels to picture files."""

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from models.errors import PictureError
from models.pictures.output_formats import OutputFormat
from models.pictures.reading import Pixels

ENCODERS: Mapping[OutputFormat, Mapping[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 20},
    "avif": {
        "format": "AVIF", "quality": 90, "speed": 10, "subsampling": "4:4:4", "max_threads": 1
    },
}  # fmt: skip
"""Pillow's options for each format, chosen for speed.

Time in ms and size in KiB, on one thread, for three pictures: an instant one of 768×512, a
perceptual one of 768×512, and an instant one of 3840×2160. For comparison, `g_s` takes 200 ms for
768×512.

          with these options                other options
    png   19,  400 | 23,  533 | 397, 11445  level 1, no Z_RLE    20, 466 |  26, 624 |  428, 11893
                                            level 6 (default)    88, 399 | 140, 547 | 1833, 10995
    webp  13,  357 |  7,  524 | 333,  8408  quality 80 (default) 148, 285 | 111, 467 | 4878, 7518
    avif  21,   53 | 24,   74 | 711,  1760  speed 6 (default)    154, 47 |  209,  69 | 4385, 1641
    jpeg   1,  109 |  1,  136 |  29,  3067  progressive          7, 104 |    8, 127 |  196,  2882
    npy    0, 1152 |  0, 1152 |   3, 24300

PNG with Z_HUFFMAN_ONLY takes a tenth less time, but flat pictures get larger. JPEG and AVIF are
lossy: 47.6 and 45.6 dB PSNR to the instant picture."""
_TAG = ExifTags.Base


def write(pixels: Pixels, format: OutputFormat, text: Mapping[str, str] | None = None) -> bytes:
    """Write `pixels` (H, W, 3) uint8 to a picture file. PNG, WebP and NPY are lossless.

    `text` is metadata. In PNG each item becomes a text chunk; in JPEG, WebP and AVIF `Software`
    becomes the EXIF tag of this name, and all others `key: value` lines in ImageDescription. NPY
    has no metadata. Raises `PictureError` if a side is too long for the format.
    """
    out = io.BytesIO()
    if format == "npy":
        np.save(out, pixels, allow_pickle=False)
        return out.getvalue()
    options = dict(ENCODERS[format])
    if text and format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in text.items():
            options["pnginfo"].add_text(key, value)
    elif text:
        options["exif"] = _exif(text)
    try:
        Image.fromarray(pixels).save(out, **options)
    except (OSError, ValueError) as e:
        height, width = pixels.shape[:2]
        raise PictureError(
            f"{width}×{height} pixels cannot be written as {format}: {e}; choose another format"
        ) from e
    return out.getvalue()


def _exif(text: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    items = dict(text)
    if software := items.pop("Software", ""):
        exif[_TAG.Software] = software
    exif[_TAG.ImageDescription] = "\n".join(f"{k}: {v}" for k, v in items.items())
    return exif
