"""Picture files to pixels and back."""

import io
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from models.bitstream import check_size
from models.errors import AfterimageError, PictureError, PictureTooLarge, UnsupportedPicture

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
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
"""What is read: formats whose size is known before their pixels are decoded."""
ENCODERS: Mapping[OutputFormat, Mapping[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 20},
    "avif": {
        "format": "AVIF", "quality": 90, "speed": 10, "subsampling": "4:4:4", "max_threads": 1
    },
}  # fmt: skip
"""Pillow's settings. ms and KiB of one 768×512 picture on one thread, instant | perceptual:

    png   30, 399 |  37, 533   level 1 without Z_RLE  33, 465 |  42, 624
                               level 6, the default  137, 399 | 218, 546; level 9 976 ms
    webp  22, 356 |  13, 524   quality 80, default    92, 357 |  33, 524; method 1 72, 300
    avif  39,  53 |  44,  73   speed 8               114,  53 | 124,  73; 6, default 304, 46
    jpeg   2, 109 |   2, 136   progressive            11, 104 |  13, 127
    npy  0.2, 1152

A decode takes about 400 ms. JPEG and AVIF lose detail: 47.6 and 45.6 dB to the instant picture."""


def read(data: bytes, max_pixels: int) -> Pixels:
    """A picture file -> (H, W, 3) uint8 in sRGB: upright by EXIF, alpha flattened on white.

    ICC profiles are what colour is managed by; samples keep their upper 8 bits. A transparent
    *colour* of a 16-bit PNG is not read. Of several frames, the first is.

    Raises `UnsupportedPicture` for what is no picture, `PictureTooLarge` before decoding one with
    more than `max_pixels`, `PictureError` for a broken one.
    """
    if not data:
        raise PictureError("the picture is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_size(source.height, source.width, max_pixels)
            profile = source.info.get("icc_profile")
            upright = _white_is_most(source, ImageOps.exif_transpose(source))
            picture = _to_rgb(upright, profile)
    except AfterimageError:
        raise
    except UnidentifiedImageError as e:
        raise UnsupportedPicture("not a picture in a format that is read here") from e
    except Image.DecompressionBombError as e:
        raise PictureTooLarge(str(e)) from e
    except Exception as e:  # Pillow's plugins raise almost anything at damaged files
        raise PictureError(f"the picture cannot be read: {e}") from e
    return np.asarray(picture).copy()


def write(pixels: Pixels, format: OutputFormat, text: Mapping[str, str] | None = None) -> bytes:
    """(H, W, 3) uint8 -> a picture file; PNG and WebP hold the very pixels, NPY the array.

    `text` becomes PNG's texts, else EXIF: its `Software`, and `key: value` lines as description.
    NPY has no place for it. Raises `PictureError` where the format cannot hold so large a side.
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
        Image.fromarray(pixels, "RGB").save(out, **options)
    except (OSError, ValueError) as e:
        height, width = pixels.shape[:2]
        raise PictureError(f"{width}×{height} pixels cannot be written as {format}: {e}") from e
    return out.getvalue()


def _exif(text: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    others = dict(text)
    if software := others.pop("Software", ""):
        exif[ExifTags.Base.Software] = software
    exif[ExifTags.Base.ImageDescription] = "\n".join(f"{k}: {v}" for k, v in others.items())
    return exif


def _white_is_most(source: Image.Image, upright: Image.Image) -> Image.Image:
    """Pillow inverts a TIFF whose white is zero, but not one of 16 bits."""
    if isinstance(source, TiffImagePlugin.TiffImageFile) and upright.mode.startswith("I;16"):
        if source.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0:
            return Image.fromarray(0xFFFF - np.asarray(upright).astype(np.uint16))
    return upright


def _to_rgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if picture.mode in {"I", "I;16", "I;16B", "I;16L", "I;16N"}:  # 16-bit grey
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnsupportedPicture("pictures with more than 16 bits a sample are not read")
        picture = Image.fromarray((values >> 8).astype(np.uint8), "L")
    if picture.mode == "F":
        raise UnsupportedPicture("floating-point pictures are not read")
    alpha = None
    if picture.mode in {"P", "PA", "1", "YCbCr"} or "transparency" in picture.info:
        has_alpha = picture.mode == "PA" or "transparency" in picture.info
        picture = picture.convert("RGBA" if has_alpha else "RGB")
    if picture.mode in {"RGBA", "LA"}:
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
    if profile and picture.mode in {"RGB", "L", "CMYK"}:
        picture = _to_srgb(picture, profile)
    picture = picture.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", picture.size, (255, 255, 255))
        picture = Image.composite(picture, white, alpha)
    return picture


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):  # a profile that does not fit says nothing
        return picture
    return picture if converted is None else converted
