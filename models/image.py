"""Read picture files to pixels, and write pixels to picture files."""

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
"""Formats that `read` accepts: those whose size is known before their pixels are decoded."""
MAX_SCANS = 1000
"""Limit on scans in a JPEG file. A scan can be as short as 14 bytes, and each takes 1 ms per
megapixel to decode. Cameras write one scan, progressive files ten. Scans are counted by their
marker, and data behind the picture may contain some hundred more markers."""
_BIGTIFF = 43
"""Version number of TIFF files with 64-bit offsets; other TIFF files have 42."""
_TIFF_INTEGERS = {3: 2, 4: 4}
"""TIFF field types that a tile's side may have (SHORT, LONG) -> their size in bytes."""
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
_PNG_DEPTH = 24
"""Position of the byte with the bits per sample in a PNG file."""
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


def read(data: bytes, max_pixels: int) -> Pixels:
    """Read a picture file to (H, W, 3) uint8 in sRGB.

    The EXIF orientation and the ICC profile are applied; both are ignored if they are broken.
    Transparent pixels are blended with white. The transparent colour (tRNS) of a 16-bit PNG is
    ignored. Samples of 16 bits are reduced to their upper 8 bits. Of several frames only the first
    is read.

    Raises `UnsupportedPicture` for other formats, `PictureTooLarge` for more than `max_pixels`
    (before they are decoded), `PictureError` for a damaged file.
    """
    if not data:
        raise PictureError("the picture is empty: it has 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_size(source.height, source.width, max_pixels)
            _check_work(source, data, max_pixels)
            source.load()
            if source.format == "PNG" and data[_PNG_DEPTH] == 16:
                source.info.pop("transparency", None)  # Pillow misreads its 16 bits as 8
            upright = _upright(_eight_bits(source), _orientation(source))
            picture = _to_rgb(upright, source.info.get("icc_profile"))
    except AfterimageError:
        raise
    except UnidentifiedImageError as e:
        formats = ", ".join(FORMATS)
        raise UnsupportedPicture(f"not a picture in a supported format; use {formats}") from e
    except Image.DecompressionBombError as e:
        raise PictureTooLarge(str(e)) from e
    except Exception as e:  # Pillow raises many kinds of errors for damaged files
        raise PictureError(f"the picture is damaged and cannot be read: {e}") from e
    return np.array(picture)


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


def _check_work(source: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse pictures that take much more time or memory to decode than their size suggests.

    Raises `PictureError` for JPEG files of too many scans, `PictureTooLarge` for TIFF files whose
    tiles are larger than `max_pixels`.
    """
    if source.format in {"JPEG", "MPO"}:
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise PictureError(f"the JPEG file has {scans} scans; the limit is {MAX_SCANS} scans")
    if isinstance(source, TiffImagePlugin.TiffImageFile):  # libtiff unpacks whole tiles
        width, height = _tile_size(data, source.tag_v2.offset)
        if width * height > max_pixels:
            raise PictureTooLarge(
                f"the TIFF file has tiles of {width}×{height} pixels; the limit is {max_pixels}"
            )


def _tile_size(data: bytes, directory: int) -> tuple[int, int]:
    """Return width and height of a TIFF file's tiles; 0 if it has none.

    They are read from the bytes of the directory, because Pillow skips entries that libtiff reads.
    If a tag is repeated, the largest value counts. Raises `PictureError` unless the sides are
    single integers.
    """
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
            if kind not in _TIFF_INTEGERS or count != 1:
                raise PictureError(
                    f"the TIFF file's tile sides are not integers: field type {kind}, count {count}"
                )
            sides[tag] = max(sides[tag], number(at + value, _TIFF_INTEGERS[kind]))
    width, height = sides.values()
    return width, height


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Reduce grey pictures of up to 16 bits to their upper 8 bits; return others unchanged.

    Raises `UnsupportedPicture` for floating-point samples and for more than 16 bits. Pillow reads
    colour with 8 bits always.
    """
    if picture.mode == "F":
        raise UnsupportedPicture("floating-point samples are not supported; use 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnsupportedPicture("samples of more than 16 bits are not supported; use 8 or 16 bits")
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # Pillow does this up to 8 bits only
        if picture.tag_v2.get(_TAG.BitsPerSample) == (12,):
            values = values << 4
        if picture.tag_v2.get(_TAG.PhotometricInterpretation) == 0:
            values = 0xFFFF - values
    return Image.fromarray((values >> 8).astype(np.uint8))


def _orientation(picture: Image.Image) -> object:
    """Return the orientation from EXIF or XMP; None if it is missing or broken.

    The picture must be loaded. Pillow applies the orientation of TIFF files itself.
    """
    try:
        return picture.getexif().get(_TAG.Orientation)
    except Exception:  # Pillow raises many kinds of errors for broken EXIF data
        return None


def _upright(picture: Image.Image, orientation: object) -> Image.Image:
    operation = _TRANSPOSE.get(orientation)
    return picture if operation is None else picture.transpose(operation)


def _to_rgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert any mode to RGB: apply the ICC profile and blend transparent pixels with white."""
    alpha = None
    if picture.mode == "L" and "transparency" in picture.info:
        picture = picture.convert("LA")  # stays grey, as its profile is for grey
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
    except (ImageCms.PyCMSError, OSError):  # ignore a profile that is broken or of another mode
        return picture
    return picture if converted is None else converted
