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
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from models.errors import AfterimageError, PictureError, PictureTooLarge, UnsupportedPicture
from models.geometry import check_size

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
_BIGTIFF = 43
"""In the place of 42, in TIFF files whose offsets have 64 bits."""
_SIZES = {3: 2, 4: 4}
"""Types that a tile's side has in TIFF files, and their bytes."""
MAX_SCANS = 1000
"""Of a JPEG: 14 bytes can be a whole scan, and each takes 1 ms a megapixel. Cameras write one,
progressive files ten; what follows the picture in its file may look like some hundred more."""
ENCODERS: Mapping[OutputFormat, Mapping[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 20},
    "avif": {
        "format": "AVIF", "quality": 90, "speed": 10, "subsampling": "4:4:4", "max_threads": 1
    },
}  # fmt: skip
"""Pillow's settings. ms and KiB of one 768×512 picture on one thread, instant | perceptual, and
of an instant one of 3840×2160; where `g_s` takes 200 ms for the small one:

    png   19, 400 | 23, 533 |  397, 11445   level 1 without Z_RLE  20, 466 |  26, 624 |  428, 11893
                                            level 6, the default   88, 399 | 140, 547 | 1833, 10995
    webp  13, 357 |  7, 524 |  333,  8408   quality 80, default   148, 285 | 111, 467 | 4878,  7518
    avif  21,  53 | 24,  74 |  711,  1760   speed 6, the default  154,  47 | 209,  69 | 4385,  1641
    jpeg   1, 109 |  1, 136 |   29,  3067   progressive             7, 104 |   8, 127 |  196,  2882
    npy    0, 1152 | 0, 1152 |   3, 24300

Z_HUFFMAN_ONLY saves a tenth of PNG's time, and grows flat pictures. JPEG and AVIF lose detail: 47.6
and 45.6 dB to the instant picture."""


_PNG_DEPTH = 24
"""Where a PNG file says how many bits a sample has: behind signature, IHDR's head, both sides."""
_TAG = ExifTags.Base
_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


def read(data: bytes, max_pixels: int) -> Pixels:
    """A picture file -> (H, W, 3) uint8 in sRGB: upright by EXIF, alpha flattened on white.

    ICC profiles are what colour is managed by; samples keep their upper 8 bits. Profiles and EXIF
    data that are broken say nothing. A transparent *colour* of a 16-bit PNG is not read. Of several
    frames, the first is.

    Raises `UnsupportedPicture` for what is no picture, `PictureTooLarge` before decoding one with
    more than `max_pixels`, `PictureError` for a broken one.
    """
    if not data:
        raise PictureError("the picture is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_size(source.height, source.width, max_pixels)
            _check_work(source, data, max_pixels)
            source.load()
            if source.format == "PNG" and data[_PNG_DEPTH] == 16:
                source.info.pop("transparency", None)  # Pillow would mistake it for 8 bits
            upright = _upright(_eight_bits(source), _orientation(source))
            picture = _to_rgb(upright, source.info.get("icc_profile"))
    except AfterimageError:
        raise
    except UnidentifiedImageError as e:
        known = ", ".join(FORMATS)
        raise UnsupportedPicture(f"no picture in a format that is read: {known}") from e
    except Image.DecompressionBombError as e:
        raise PictureTooLarge(str(e)) from e
    except Exception as e:  # Pillow's plugins raise almost anything at damaged files
        raise PictureError(f"the picture cannot be read: {e}") from e
    return np.array(picture)


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
        Image.fromarray(pixels).save(out, **options)
    except (OSError, ValueError) as e:
        height, width = pixels.shape[:2]
        raise PictureError(f"{width}×{height} pixels cannot be written as {format}: {e}") from e
    return out.getvalue()


def _exif(text: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    others = dict(text)
    if software := others.pop("Software", ""):
        exif[_TAG.Software] = software
    exif[_TAG.ImageDescription] = "\n".join(f"{k}: {v}" for k, v in others.items())
    return exif


def _check_work(source: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse small pictures that take much time or memory to decode."""
    if source.format in {"JPEG", "MPO"} and data.count(b"\xff\xda") > MAX_SCANS:
        raise PictureError(f"a JPEG of more than {MAX_SCANS} scans")
    if isinstance(source, TiffImagePlugin.TiffImageFile):  # a tile is unpacked whole
        width, height = _tile(data, source.tag_v2.offset)
        if width * height > max_pixels:
            raise PictureTooLarge(f"tiles of {width}×{height} pixels; the limit is {max_pixels}")


def _tile(data: bytes, directory: int) -> tuple[int, int]:
    """Width and height of the tiles of a TIFF file, as its bytes say: libtiff reads entries that
    Pillow skips. 0 where it has none; `PictureError` where they are no plain numbers."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    word, size, value = (8, 20, 12) if number(2, 2) == _BIGTIFF else (4, 12, 8)
    first = directory + (8 if word == 8 else 2)
    end = min(first + number(directory, first - directory) * size, len(data))
    sides = {int(_TAG.TileWidth): 0, int(_TAG.TileLength): 0}
    for at in range(first, end, size):
        if (tag := number(at, 2)) in sides:
            kind, count = number(at + 2, 2), number(at + 4, word)
            if kind not in _SIZES or count != 1:
                raise PictureError("a TIFF file whose tiles' sides are no numbers")
            sides[tag] = max(sides[tag], number(at + value, _SIZES[kind]))
    width, height = sides.values()
    return width, height


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of up to 16 bits -> its upper 8; other pictures as they are, they have 8 already.

    Raises `UnsupportedPicture` for more bits.
    """
    if picture.mode == "F":
        raise UnsupportedPicture("floating-point pictures are not read")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnsupportedPicture("pictures with more than 16 bits a sample are not read")
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # what Pillow does to fewer bits only
        if picture.tag_v2.get(_TAG.BitsPerSample) == (12,):
            values = values << 4
        if picture.tag_v2.get(_TAG.PhotometricInterpretation) == 0:
            values = 0xFFFF - values
    return Image.fromarray((values >> 8).astype(np.uint8))


def _orientation(picture: Image.Image) -> object:
    """By EXIF or XMP, once the picture is loaded (Pillow turns TIFF itself)."""
    try:
        return picture.getexif().get(_TAG.Orientation)
    except Exception:  # Pillow raises almost anything at broken EXIF data
        return None


def _upright(picture: Image.Image, orientation: object) -> Image.Image:
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    alpha = None
    if picture.mode == "L" and "transparency" in picture.info:
        picture = picture.convert("LA")  # grey still, as its profile has it
    elif picture.mode in {"P", "PA", "1", "YCbCr"} or "transparency" in picture.info:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
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
