"""Read picture files to pixels, and write pixels to picture files."""

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from models import image_color, image_decode, image_formats
from models.errors import AfterimageError, PictureError, PictureTooLarge
from models.image_color import Colour
from models.image_formats import usual_name

Pixels = NDArray[np.uint8]
OutputFormat = Literal["png", "jpeg", "webp", "avif", "npy"]

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "npy": "application/x-npy",
}
SUFFIXES: Mapping[str, OutputFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
    ".npy": "npy",
}
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
_TRANSPOSE: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that makes the picture upright."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file's pixels (H, W, 3) in sRGB, and notes for the user, e.g. on truncation."""

    pixels: Pixels
    notes: tuple[str, ...] = ()


def read(data: bytes, max_pixels: int) -> Pixels:
    """Read a picture file to (H, W, 3) uint8 in sRGB.

    The EXIF orientation and the colours (ICC profile, codes of H.273, a PNG's gamma) are applied;
    both are ignored if they are broken. Transparent pixels are blended with white. Samples of 16
    bits keep their upper 8, after colours are applied. Of several frames, the first is read.

    Raises `UnsupportedPicture` for other formats and for HDR, `PictureTooLarge` for more than
    `max_pixels` (before they are decoded), `PictureError` for a damaged or truncated file. A file
    that lacks only its last bytes, but no pixels, is read.
    """
    picture = read_with_notes(data, max_pixels)
    if picture.notes:
        raise PictureError(f"the picture is damaged and cannot be read: {'; '.join(picture.notes)}")
    return picture.pixels


def read_with_notes(data: bytes, max_pixels: int) -> Picture:
    """Read a picture file as `read` does, but read a truncated file as far as it goes.

    `notes` says that pixels are missing: those are grey in a JPEG file, black in others.
    """
    if not data:
        raise PictureError("the picture is empty: it has 0 bytes")
    format = image_formats.check(data)
    try:
        decoded = image_decode.decode(data, format, max_pixels)
        upright = _upright(decoded.picture, decoded.orientation)
        pixels = _to_rgb(upright, decoded.colour)
    except AfterimageError:
        raise
    except Image.DecompressionBombError as e:
        raise PictureTooLarge(str(e)) from e
    except Exception as e:  # Pillow raises many kinds of errors for damaged files
        raise PictureError(
            f"the {usual_name(format)} file is damaged and cannot be read: {e}"
        ) from e
    return Picture(pixels, decoded.notes)


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


def _upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    operation = _TRANSPOSE.get(orientation)
    return picture if operation is None else picture.transpose(operation)


def _to_rgb(picture: Image.Image, colour: Colour | bytes | None) -> Pixels:
    """Convert a picture of any mode to sRGB, and blend transparent pixels with white."""
    alpha = None
    if picture.mode in {"P", "PA", "1", "YCbCr"} or "transparency" in picture.info:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode in {"RGBA", "LA"}:
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
    if isinstance(colour, bytes) and picture.mode in {"RGB", "L", "CMYK"}:
        picture = image_color.apply_profile(picture, colour)
    picture = picture.convert("RGB")
    if isinstance(colour, Colour):
        picture = Image.fromarray(image_color.to_srgb(np.asarray(picture), colour))
    if alpha is not None:
        white = Image.new("RGB", picture.size, (255, 255, 255))
        picture = Image.composite(picture, white, alpha)
    return np.array(picture)
