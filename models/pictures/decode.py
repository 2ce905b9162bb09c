"""Decode a file of any picture format to a Pillow picture, with its colours and orientation."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from models.errors import PictureError, PictureTooLarge, UnsupportedPicture
from models.geometry import check_size
from models.pictures import bmp, boxes, color, formats, jpeg, jxl, png, tiff, webp
from models.pictures.color import Colour

_TAG = ExifTags.Base
MISSING = "the picture is truncated: pixels are missing"
"""Note on a picture that was read in part."""


@dataclass(slots=True)
class Decoded:
    """A picture as the file stores it: not yet turned upright, converted to sRGB, or put on white.

    `colour` is an ICC profile (bytes), other colours, or None for sRGB.
    """

    picture: Image.Image
    colour: Colour | bytes | None = None
    orientation: int | None = None
    notes: tuple[str, ...] = ()


def decode(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a file of a format that `formats.check` returned. All samples get 8 bits.

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
    """Decode a file with which Pillow needs no help."""
    source = formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    notes = _load(source)
    return Decoded(source, source.info.get("icc_profile"), _orientation(source), notes)


def _webp(data: bytes, format: str, max_pixels: int) -> Decoded:
    def open_file(file: bytes) -> ImageFile.ImageFile:
        source = formats.open_file(file, format)
        check_size(source.height, source.width, max_pixels)
        return source

    if not webp.has_wrong_size(data):
        return _other(data, format, max_pixels)
    picture, whole = webp.read_repaired(data, open_file)
    notes = () if whole else _missing(picture)
    return Decoded(picture, picture.info.get("icc_profile"), _orientation(picture), notes)


def _png(data: bytes, format: str, max_pixels: int) -> Decoded:
    file = png.parse(data, max_pixels)
    colour, orientation = file.colour(), tiff.orientation(file.exif)
    transparent = file.transparent()
    if file.depth == 16 and (colour or transparent):
        samples, complete = file.samples()
        alpha = _alpha(samples, file.has_alpha, transparent)
        channels = samples[..., :-1] if file.has_alpha else samples
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
    with Image.open(file.file(), formats=["PNG"]) as source:
        notes = _load(source)
        picture = source
        if transparent is not None:
            picture = _with_transparent_colour(source, file.depth, transparent)
        return Decoded(picture, colour, orientation, notes)


def _with_transparent_colour(
    picture: Image.Image, depth: int, transparent: tuple[int, ...]
) -> Image.Image:
    """Return a grey or RGB picture of up to 8 bits in which one colour is transparent.

    `transparent` has `depth` bits. Pillow has stretched such samples to 0…255.
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
    """Return the opacity (mode L) of samples (H, W, C): their last channel, or 0 for one colour."""
    if has_alpha:
        return Image.fromarray((samples[..., -1] >> 8).astype(np.uint8))
    if transparent is None:
        return None
    hidden = (samples == np.array(transparent, samples.dtype)).all(-1)
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _jpeg(data: bytes, format: str, max_pixels: int) -> Decoded:
    jpeg.check(data)
    source = formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    decoded = Decoded(source, source.info.get("icc_profile"), _orientation(source))
    try:
        source.load()
    except OSError as e:
        if "truncated" not in str(e):
            raise
        decoded.picture, whole = jpeg.read_truncated(data)
        decoded.notes = () if whole else _missing(decoded.picture)
    return decoded


def _tiff(data: bytes, format: str, max_pixels: int) -> Decoded:
    if tiff.is_big_endian_bigtiff(data):
        data = tiff.as_classic(data)
    tiff.check(data, max_pixels)
    missing = tiff.missing_bytes(data, max_pixels)
    if missing:
        return _truncated_tiff(data, missing, max_pixels)
    source, orientation = _open_tiff(data, max_pixels)
    profile = source.info.get("icc_profile")
    exact = _exact(profile)
    lower = tiff.lower_bytes(source, data) if exact else None
    source.load()
    if tiff.is_grey_alpha_16(source):
        return _grey_alpha_16(source, profile, orientation)
    if exact is None or lower is None:
        return Decoded(source, profile, orientation)
    samples = np.asarray(source)[..., :3].astype(np.uint16) << 8 | np.asarray(lower)[..., :3]
    picture = _convert(samples, exact)
    if source.mode == "RGBA":
        picture.putalpha(source.getchannel("A"))
    return Decoded(picture, None, orientation)


def _open_tiff(data: bytes, max_pixels: int) -> tuple[TiffImagePlugin.TiffImageFile, int | None]:
    """Open a file; the second value is the orientation if Pillow does not apply it."""
    source = formats.open_file(data, "TIFF")
    if not isinstance(source, TiffImagePlugin.TiffImageFile):
        raise PictureError("the TIFF file is damaged: its header cannot be read")
    check_size(source.height, source.width, max_pixels)
    return source, tiff.prepare(source, data)


def _truncated_tiff(data: bytes, missing: int, max_pixels: int) -> Decoded:
    """Decode a file as far as it goes. A strip that is not complete is lost if it is compressed."""
    (source, orientation), (other, _) = (
        _open_tiff(data + filler * missing, max_pixels) for filler in (b"\0", b"\xff")
    )
    notes = _load(source, "decoder error")
    if not notes:  # the filler may be behind the last pixel
        other.load()
        notes = () if source.tobytes() == other.tobytes() else _missing(source)
    return Decoded(source, source.info.get("icc_profile"), orientation, notes)


def _grey_alpha_16(
    source: TiffImagePlugin.TiffImageFile, profile: bytes | None, orientation: int | None
) -> Decoded:
    grey, alpha = tiff.grey_alpha_16(source)
    exact = _exact(profile)
    if exact is None:
        picture = Image.fromarray((grey[..., 0] >> 8).astype(np.uint8))
    else:
        picture, profile = _convert(grey, exact), None
    picture.putalpha(Image.fromarray((alpha >> 8).astype(np.uint8)))
    return Decoded(picture, profile, orientation)


def _gif(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode the first frame; the canvas around it is transparent, as in browsers."""
    source = formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    frame = source.tile[0].extents if source.tile else None
    notes = _load(source)
    if frame is None or frame == (0, 0, *source.size):
        return Decoded(source, None, None, notes)
    canvas = Image.new("RGBA", source.size, (255, 255, 255, 0))
    canvas.paste(source.convert("RGBA").crop(frame), frame)
    return Decoded(canvas, None, None, notes)


def _bmp(data: bytes, format: str, max_pixels: int) -> Decoded:
    picture = bmp.read_fields(data, max_pixels)
    if picture is not None:
        return Decoded(picture)
    source = formats.open_file(data, format)
    check_size(source.height, source.width, max_pixels)
    return Decoded(source, notes=_load(source))


def _avif(data: bytes, format: str, max_pixels: int) -> Decoded:
    properties = boxes.properties(data)
    with _truncation_named(data, format):
        source = formats.open_file(boxes.with_auxiliary_sizes(data), format)
        check_size(source.height, source.width, max_pixels)
        colour = source.info.get("icc_profile") or properties.colour()
        source.load()
    box = properties.crop(*source.size)
    picture = source.crop(box) if box else source
    return Decoded(picture, colour, _orientation(source))


def _heic(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a HEIC file. libheif applies the clean aperture and the orientation."""
    with _truncation_named(data, format):
        heif = importlib.import_module("pi_heif").open_heif(data)
        check_size(heif.size[1], heif.size[0], max_pixels)
        colour = heif.info.get("icc_profile") or boxes.properties(data).colour()
        return Decoded(heif.to_pillow(), colour)


@contextmanager
def _truncation_named(data: bytes, format: str) -> Iterator[None]:
    """Say of a truncated file that it is one. The decoders of its video frames need all bytes."""
    try:
        yield
    except (UnsupportedPicture, PictureTooLarge):
        raise
    except Exception as e:
        if not boxes.is_truncated(data):
            raise
        raise PictureError(
            f"the {format} file is truncated, and no part of such a file can be decoded"
        ) from e


def _jxl(data: bytes, format: str, max_pixels: int) -> Decoded:
    """Decode a JPEG XL file. libjxl applies the orientation."""
    width, height = jxl.size(data)
    check_size(height, width, max_pixels)
    return Decoded(*jxl.read(data))


_DECODERS: Mapping[str, Callable[[bytes, str, int], Decoded]] = {
    "PNG": _png,
    "WEBP": _webp,
    "JPEG": _jpeg,
    "TIFF": _tiff,
    "GIF": _gif,
    "BMP": _bmp,
    "AVIF": _avif,
    "HEIC": _heic,
    "JXL": _jxl,
}


def _load(source: ImageFile.ImageFile, truncated: str = "truncated") -> tuple[str, ...]:
    """Decode the pixels and return notes. Pixels that a truncated file lacks stay black.

    `truncated` is a part of Pillow's error about truncated files.
    """
    try:
        source.load()
    except OSError as e:
        if truncated not in str(e) or source._im is None:
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
    """Return the orientation in Exif data. That in XMP is ignored, as in viewers."""
    exif = source.info.get("exif")
    return tiff.orientation(exif) if isinstance(exif, bytes) else None


def _sixteen_bits(picture: Image.Image) -> NDArray[np.uint16]:
    """Return the samples of a grey picture of up to 16 bits, stretched to 16 bits.

    Raises `UnsupportedPicture` for more than 16 bits, and for negative samples.
    """
    values = np.asarray(picture)
    if values.min() < 0:
        raise UnsupportedPicture("signed samples are not supported; use 8 or 16 bits unsigned")
    if values.max() > 0xFFFF:
        raise UnsupportedPicture("samples of more than 16 bits are not supported; use 8 or 16 bits")
    samples: NDArray[np.uint16] = values.astype(np.uint16)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # Pillow does this up to 8 bits only
        if picture.tag_v2.get(_TAG.BitsPerSample) == (12,):
            samples <<= 4
        if picture.tag_v2.get(_TAG.PhotometricInterpretation) == 0:
            samples = ~samples
    return samples


def _exact(colour: Colour | bytes | None) -> Colour | None:
    """Return colours for samples of 16 bits; None for sRGB and for ICC profiles with tables."""
    return color.from_profile(colour) if isinstance(colour, bytes) else colour


def _convert(samples: NDArray[np.uint16], colour: Colour) -> Image.Image:
    """Convert grey or RGB samples (H, W, 1 or 3) to sRGB."""
    if samples.shape[-1] == 1:
        samples = np.broadcast_to(samples, (*samples.shape[:2], 3))
    return Image.fromarray(color.to_srgb(samples, colour))
