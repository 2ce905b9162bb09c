"""Read picture files to pixels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import AfterimageError, PictureError, PictureTooLarge
from models.pictures import color, decode, formats
from models.pictures.color import Colour
from models.pictures.signatures import usual_name

Pixels = NDArray[np.uint8]
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
    format = formats.check(data)
    try:
        decoded = decode.decode(data, format, max_pixels)
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
        picture = color.apply_profile(picture, colour)
    picture = picture.convert("RGB")
    if isinstance(colour, Colour):
        picture = Image.fromarray(color.to_srgb(np.asarray(picture), colour))
    if alpha is not None:
        white = Image.new("RGB", picture.size, (255, 255, 255))
        picture = Image.composite(picture, white, alpha)
    return np.array(picture)
