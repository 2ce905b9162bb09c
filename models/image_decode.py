"""Decode each picture format to a Pillow picture, with what is known of its colours."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from models import (
    image_bmp,
    image_boxes,
    image_color,
    image_formats,
    image_jpeg,
    image_jxl,
    image_png,
    image_tiff,
)
from models.errors import PictureError, UnsupportedPicture
from models.geometry import check_size
from models.image_color import Colour

_TAG = ExifTags.Base
MISSING = "the picture is truncated: pixels are missing"
"""Note on a picture that was read in part."""


@dataclass(slots=True)
class Decoded:
    """A picture as it is stored: not yet upright, converted to sRGB or blended with white.

    `colour` is an ICC profile if it is bytes, and sRGB if it is None.
    """

    picture: Image.Image
    colour: Colour | bytes | None = None
    orientation: int | None = None
    notes: tuple[str, ...] = ()


def decode(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a file of a format that `image_formats.check` returned. All samples get 8 bits.

    Raises `UnsupportedPicture`, `PictureTooLarge` (before pixels are decoded), `PictureError`, and
    whatever Pillow raises for a damaged file.
    """
    decoded = _DECODERS.get(format, _other)(data, format, max_pixels)
    picture = decoded.picture
    if picture.mode in {"La", "RGBa"}:  # colours multiplied by alpha
        decoded.picture = picture.convert(picture.mode.upper())
    if picture.mode == "F":
        raise UnsupportedPicture("floating-point samples are not supported; use 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = _sixteen_bits(picture)
        colour = _exact(decoded.colour)
        if colour is None:
            decoded.picture = Image.fromarray((values >> 8).astype(np.uint8))
        else:
            decoded.picture = _convert(values[..., None], colour)
            decoded.colour = None
    return decoded


def _other(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a WebP or PNM file."""
    source = image_formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    notes = _load(source)
    return Decoded(source, source.info.get("icc_profile"), _orientation(source), notes)


def _png(data: bytes, format: str, max_pixels: int) -> Decoded:
    png = image_png.parse(data, max_pixels)
    colour, orientation = png.colour(), image_tiff.orientation(png.exif)
    transparent = png.transparent()
    if png.depth == 16 and (colour or transparent):
        samples, complete = png.samples()
        alpha = _alpha(samples, png.has_alpha, transparent)
        channels = samples[..., :-1] if png.has_alpha else samples
        exact = _exact(colour)
        if exact is None:
            upper = (channels >> 8).astype(np.uint8)
            picture = Image.fromarray(upper[..., 0] if upper.shape[-1] == 1 else upper)
        else:
            picture, colour = _convert(channels, exact), None
        notes = () if complete else _missing(picture)
        if alpha is not None:
            picture.putalpha(alpha)
        return Decoded(picture, colour, orientation, notes)
    with Image.open(png.file(), formats=["PNG"]) as source:
        notes = _load(source)
        picture = source
        if transparent is not None:
            picture = _with_transparent_colour(source, png.depth, transparent)
        return Decoded(picture, colour, orientation, notes)


def _with_transparent_colour(
    picture: Image.Image, depth: int, transparent: tuple[int, ...]
) -> Image.Image:
    """Return a grey or RGB picture of up to 8 bits with an alpha channel.

    Pillow stretches samples of less than 8 bits to 0…255.
    """
    picture = picture.convert("L") if picture.mode == "1" else picture.copy()
    samples = np.asarray(picture).reshape(picture.height, picture.width, -1)
    scale = 255 // ((1 << depth) - 1)
    alpha = _alpha(samples, False, tuple(value * scale for value in transparent))
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


def _alpha(
    samples: NDArray[Any], has_alpha: bool, transparent: tuple[int, ...] | None
) -> Image.Image | None:
    """Return the opacity (L) of samples (H, W, C): their last channel, or from one colour."""
    if has_alpha:
        return Image.fromarray((samples[..., -1] >> 8).astype(np.uint8))
    if transparent is None:
        return None
    hidden = (samples == np.array(transparent, samples.dtype)).all(-1)
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _jpeg(data: bytes, format: str, max_pixels: int) -> Decoded:
    image_jpeg.check(data)
    source = image_formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    decoded = Decoded(source, source.info.get("icc_profile"), _orientation(source))
    try:
        source.load()
    except OSError as e:
        if "truncated" not in str(e):
            raise
        decoded.picture, whole = image_jpeg.read_truncated(data)
        decoded.notes = () if whole else _missing(decoded.picture)
    return decoded


def _tiff(data: bytes, format: str, max_pixels: int) -> Decoded:
    if image_tiff.is_big_endian_bigtiff(data):
        data = image_tiff.as_classic(data)
    image_tiff.check(data, max_pixels)
    source = image_formats.open_file(data, format)
    if not isinstance(source, TiffImagePlugin.TiffImageFile):
        raise PictureError("the TIFF file is damaged: its header cannot be read")
    check_size(source.height, source.width, max_pixels)
    orientation = image_tiff.prepare(source, data)
    profile = source.info.get("icc_profile")
    exact = _exact(profile)
    lower = image_tiff.lower_bytes(source, data) if exact else None
    source.load()
    if exact is None or lower is None:
        return Decoded(source, profile, orientation)
    samples = np.asarray(source)[..., :3].astype(np.uint16) << 8 | np.asarray(lower)[..., :3]
    picture = _convert(samples, exact)
    if source.mode == "RGBA":
        picture.putalpha(source.getchannel("A"))
    return Decoded(picture, None, orientation)


def _gif(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode the first frame; the canvas around it is transparent, as in browsers."""
    source = image_formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    frame = source.tile[0].extents if source.tile else None
    notes = _load(source)
    if frame is None or frame == (0, 0, *source.size):
        return Decoded(source, None, None, notes)
    canvas = Image.new("RGBA", source.size, (255, 255, 255, 0))
    canvas.paste(source.convert("RGBA").crop(frame), frame)
    return Decoded(canvas, None, None, notes)


def _bmp(data: bytes, format: str, max_pixels: int) -> Decoded:
    picture = image_bmp.read_fields(data, max_pixels)
    if picture is not None:
        return Decoded(picture)
    source = image_formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    return Decoded(source, notes=_load(source))


def _avif(data: bytes, format: str, max_pixels: int) -> Decoded:
    properties = image_boxes.properties(data)
    source = image_formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    colour = source.info.get("icc_profile") or properties.colour()
    source.load()
    box = properties.crop(*source.size)
    picture = source.crop(box) if box else source
    return Decoded(picture, colour, _orientation(source))


def _heic(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a HEIC file; libheif crops and turns it."""
    heif = importlib.import_module("pi_heif").open_heif(data)
    check_size(heif.size[1], heif.size[0], max_pixels)
    colour = heif.info.get("icc_profile") or image_boxes.properties(data).colour()
    return Decoded(heif.to_pillow(), colour)


def _jxl(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a JPEG XL file; libjxl turns it."""
    width, height = image_jxl.size(data)
    check_size(height, width, max_pixels)
    return Decoded(*image_jxl.read(data))


_DECODERS: Mapping[str, Callable[[bytes, str, int], Decoded]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "TIFF": _tiff,
    "GIF": _gif,
    "BMP": _bmp,
    "AVIF": _avif,
    "HEIC": _heic,
    "JXL": _jxl,
}


def _load(source: ImageFile.ImageFile) -> tuple[str, ...]:
    """Decode the pixels; those that a truncated file lacks stay black. Returns the notes."""
    try:
        source.load()
    except OSError as e:
        if "truncated" not in str(e) or source._im is None:
            raise
        source.tile = []
        return _missing(source)
    return ()


def _missing(picture: Image.Image) -> tuple[str, ...]:
    """Return the note on a picture that lacks pixels. Raises `PictureError` if it has none."""
    samples = np.asarray(picture)
    if (samples == samples[0, 0]).all():
        raise PictureError("the picture is truncated: it has no pixels")
    return (MISSING,)


def _orientation(source: Image.Image) -> int | None:
    """Return the orientation from Exif data alone: viewers do not heed XMP's."""
    exif = source.info.get("exif")
    return image_tiff.orientation(exif) if isinstance(exif, bytes) else None


def _sixteen_bits(picture: Image.Image) -> NDArray[np.uint16]:
    """Return the samples of a grey picture of up to 16 bits, stretched to 16 bits.

    Raises `UnsupportedPicture` for more than 16 bits.
    """
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnsupportedPicture("samples of more than 16 bits are not supported; use 8 or 16 bits")
    samples: NDArray[np.uint16] = values.astype(np.uint16)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # Pillow does this up to 8 bits only
        if picture.tag_v2.get(_TAG.BitsPerSample) == (12,):
            samples <<= 4
        if picture.tag_v2.get(_TAG.PhotometricInterpretation) == 0:
            samples = ~samples
    return samples


def _exact(colour: Colour | bytes | None) -> Colour | None:
    """Return colours that can be applied to 16 bits; None for an ICC profile with tables."""
    return image_color.from_profile(colour) if isinstance(colour, bytes) else colour


def _convert(samples: NDArray[np.uint16], colour: Colour) -> Image.Image:
    """Convert grey or RGB samples (H, W, 1 or 3) to sRGB."""
    if samples.shape[-1] == 1:
        samples = np.broadcast_to(samples, (*samples.shape[:2], 3))
    return Image.fromarray(image_color.to_srgb(samples, colour))
