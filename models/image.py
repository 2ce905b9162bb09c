"""Picture files to pixels and back."""

import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from models.bitstream import check_size
from models.errors import AfterimageError, PictureError, PictureTooLarge, UnsupportedPicture

Pixels = NDArray[np.uint8]
OutputFormat = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
"""What is read: formats whose size is known before their pixels are decoded."""
PNG_LEVEL = 1
"""zlib level: 6, Pillow's default, takes about four times as long for 5 % fewer bytes."""


def read(data: bytes, max_pixels: int) -> Pixels:
    """A picture file -> (H, W, 3) uint8 in sRGB: upright by EXIF, alpha flattened on white.

    A transparent *colour* of a 16-bit PNG is not read. Of several frames, the first is.

    Raises `UnsupportedPicture` for what is no picture, `PictureTooLarge` before decoding one with
    more than `max_pixels`, `PictureError` for a broken one.
    """
    if not data:
        raise PictureError("the picture is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_size(source.height, source.width, max_pixels)
            profile = source.info.get("icc_profile")
            picture = _to_rgb(ImageOps.exif_transpose(source), profile)
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
    """(H, W, 3) uint8 -> a picture file; `text` goes into PNG metadata."""
    out = io.BytesIO()
    picture = Image.fromarray(pixels, "RGB")
    if format == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in (text or {}).items():
            info.add_text(key, value)
        picture.save(out, "PNG", compress_level=PNG_LEVEL, pnginfo=info)
    elif format == "jpeg":
        picture.save(out, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(out, "WEBP", lossless=True, method=0)
    return out.getvalue()


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
