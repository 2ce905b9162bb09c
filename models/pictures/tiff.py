"""TIFF files and Exif data, which have the same structure: corrects what Pillow reads wrongly."""

import io
import itertools
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageFile, ImagePalette, TiffImagePlugin

from models.errors import PictureError, PictureTooLarge, UnsupportedPicture

TiffImagePlugin.READ_LIBTIFF = True
"""Use libtiff for uncompressed files too: Pillow's own reader reads planes of 16 bits as 8 bits,
and does not read subsampled YCbCr."""
_TAG = ExifTags.Base
for _mark, _grey, _extra in itertools.product((b"II", b"MM"), (0, 1), ((0,), (1,), (2,))):
    TiffImagePlugin.OPEN_INFO[_mark, _grey, (1,), 1, (16, 16), _extra] = ("RGBA", "RGBA")
"""Read grey and alpha of 16 bits, for which Pillow has no mode, as four bytes."""
_BIGTIFF = 43
"""Version number of TIFF files with 64-bit offsets; other TIFF files have 42."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8,
          13: 4, 16: 8, 17: 8, 18: 8}  # fmt: skip
"""Field type -> bytes of a value."""
_INTEGERS = {1, 3, 4, 13, 16, 18}
"""Field types that are unsigned integers: BYTE, SHORT, LONG, IFD, LONG8, IFD8."""
_RAW_PHOTOMETRIC = {32803, 34892}
"""Samples of a camera's sensor: colour filter array, linear raw."""
_DNG_VERSION = 50706
_RGB_16 = {"RGB;16N", "RGBX;16N", "RGBA;16N"}
"""Pillow's raw modes of 16 bits whose samples are not multiplied by alpha."""
_MAX_FIELDS = 0xFFFF
"""Limit on the fields of a directory: that of classic TIFF; libtiff has a lower one for BigTIFF."""
_PLACES = (273, 279, 324, 325)
"""Tags: offsets and sizes of strips, offsets and sizes of tiles."""
_NEEDED = {258, 320, 347, *_PLACES}
"""Tags without whose values there are no pixels: bits of a sample, palette, tables of JPEG."""
_MAX_STRIPS = 100_000
"""Limit on the strips or tiles whose places are checked."""
_MAX_PIXEL_BYTES = 16
"""Bytes of a pixel that has the most: four samples of 32 bits."""
_MAX_DIRECTORIES = 20
"""Limit on the directories that are searched for a camera's raw samples."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of a directory. `at` is the offset of its values in the file."""

    tag: int
    kind: int
    count: int
    at: int


class Directories:
    """The directories of a TIFF file or of Exif data."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        self.big = _BIGTIFF in (data[2:3] + data[3:4])
        self.word = 8 if self.big else 4
        self.first = self.number(8, 8) if self.big else self.number(4, 4)

    def number(self, at: int, size: int) -> int:
        """Return the unsigned integer of `size` bytes at this offset."""
        return int.from_bytes(self.data[at : at + size], self.order)

    def entries(self, directory: int) -> Iterator[Entry]:
        """Yield the fields of the directory at this offset, as far as the file contains them."""
        start, size = self._table(directory)
        end = min(self.end(directory), start + _MAX_FIELDS * size, len(self.data) - size + 1)
        for at in range(start, end, size):
            tag, kind = self.number(at, 2), self.number(at + 2, 2)
            count, value = self.number(at + 4, self.word), at + 4 + self.word
            if count * _SIZES.get(kind, 1) > self.word:
                value = self.number(value, self.word)
            yield Entry(tag, kind, count, value)

    def next(self, directory: int) -> int:
        """Return the offset of the next directory; 0 if there is none."""
        return self.number(self.end(directory), self.word)

    def integers(self, entry: Entry, limit: int = 16) -> list[int]:
        """Return up to `limit` values of a field; none if it has no integers."""
        if entry.kind not in _INTEGERS:
            return []
        size = _SIZES[entry.kind]
        count = min(entry.count, limit)
        return [self.number(entry.at + i * size, size) for i in range(count)]

    def integer(self, directory: int, tag: int) -> int | None:
        """Return the first value of a tag; None if it is missing or no integer."""
        for entry in self.entries(directory):
            if entry.tag == tag:
                return next(iter(self.integers(entry, 1)), None)
        return None

    def end(self, directory: int) -> int:
        """Return the offset of the end of the fields."""
        start, size = self._table(directory)
        return start + self.number(directory, start - directory) * size

    def _table(self, directory: int) -> tuple[int, int]:
        """Offset of the first field, and bytes of a field."""
        return (directory + 8, 20) if self.big else (directory + 2, 12)


def orientation(exif: bytes) -> int | None:
    """Return the orientation in Exif data; None if it is missing or broken.

    Some programs store it as BYTE or LONG instead of SHORT.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:4] not in {b"II*\0", b"MM\0*"}:
        return None
    directories = Directories(exif)
    return directories.integer(directories.first, _TAG.Orientation)


def check(data: bytes, max_pixels: int) -> None:
    """Check a TIFF file before Pillow opens it.

    Raises `UnsupportedPicture` for a camera's raw file and for unknown compression,
    `PictureTooLarge` if tiles are larger than `max_pixels`.
    """
    directories = Directories(data)
    directory = directories.first
    if _is_raw(directories, directory):
        raise UnsupportedPicture(
            "the file is a camera's raw file, which is not read; develop it to JPEG, PNG or TIFF"
        )
    compression = directories.integer(directory, _TAG.Compression)
    if compression is not None and compression not in TiffImagePlugin.COMPRESSION_INFO:
        raise UnsupportedPicture(
            f"the TIFF file has compression {compression}, which is not read; use LZW or Deflate"
        )
    width, height = _tile_size(directories, directory)
    if width * height > max_pixels:  # libtiff unpacks whole tiles
        raise PictureTooLarge(
            f"the TIFF file has tiles of {width}×{height} pixels; the limit is {max_pixels}"
        )


def prepare(source: TiffImagePlugin.TiffImageFile, data: bytes) -> int | None:
    """Correct what Pillow reads wrongly in an opened file.

    Returns the orientation if Pillow would ignore it, because it is stored as BYTE. Raises
    `UnsupportedPicture` for samples that Pillow mixes up.
    """
    if source.tag_v2.get(_TAG.PlanarConfiguration) == 2 and _is_grey_alpha(source):
        raise UnsupportedPicture(
            "a TIFF file with grey and alpha in separate planes is not read; interleave them"
        )
    source.info.pop("xmp", None)  # Pillow would take the orientation from it
    _correct_palette(source)
    directories = Directories(data)
    for entry in directories.entries(directories.first):
        if entry.tag == _TAG.Orientation and entry.kind == 1:
            return next(iter(directories.integers(entry, 1)), None)
    return None


def missing_bytes(data: bytes, max_pixels: int) -> int:
    """Return how many bytes of the pixels a truncated file lacks.

    Raises `PictureError` if it lacks its directory, which programs may write after the pixels, or
    more bytes than `max_pixels` can need.
    """
    directories = Directories(data)
    needed = [directories.end(directories.first)] + [
        entry.at + entry.count * _SIZES.get(entry.kind, 1)
        for entry in directories.entries(directories.first)
        if entry.tag in _NEEDED
    ]
    if max(needed) > len(data):
        raise PictureError("the TIFF file is truncated: its directory is missing or incomplete")
    values = {
        entry.tag: directories.integers(entry, _MAX_STRIPS)
        for entry in directories.entries(directories.first)
        if entry.tag in _PLACES
    }
    ends = [
        start + size
        for starts, sizes in (_PLACES[:2], _PLACES[2:])
        for start, size in zip(values.get(starts, ()), values.get(sizes, ()), strict=False)
    ]
    missing = max(max(ends, default=0) - len(data), 0)
    if missing > _MAX_PIXEL_BYTES * max_pixels:
        raise PictureError(f"the TIFF file is damaged or truncated: it lacks {missing} bytes")
    return missing


def is_grey_alpha_16(source: TiffImagePlugin.TiffImageFile) -> bool:
    """True if the four bytes of a pixel are grey and alpha of 16 bits."""
    return source.mode == "RGBA" and source.tag_v2.get(_TAG.BitsPerSample) == (16, 16)


def _is_grey_alpha(source: TiffImagePlugin.TiffImageFile) -> bool:
    return source.mode in {"LA", "La"} or is_grey_alpha_16(source)


def grey_alpha_16(
    source: TiffImagePlugin.TiffImageFile,
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return grey (H, W, 1) and alpha (H, W) of such a picture; grey is not multiplied by alpha."""
    samples = np.ascontiguousarray(np.asarray(source)).view(np.uint16)
    grey, alpha = samples[..., :1], samples[..., 1]
    if source.tag_v2.get(_TAG.PhotometricInterpretation) == 0:
        grey = ~grey
    extra = source.tag_v2.get(_TAG.ExtraSamples)
    if extra == (0,):  # no alpha, but samples of an unknown meaning
        alpha = np.full_like(alpha, 65535)
    if extra == (1,):
        scale = 65535 / np.maximum(alpha, 1).astype(np.float32)[..., None]
        grey = np.minimum(np.rint(grey * scale), 65535).astype(np.uint16)
    return grey, alpha


def lower_bytes(
    source: TiffImagePlugin.TiffImageFile, data: bytes
) -> TiffImagePlugin.TiffImageFile | None:
    """Decode the lower bytes of RGB samples of 16 bits, of which Pillow reads only the upper ones.

    `source` is opened, but not loaded. libtiff returns samples in the byte order of this machine.
    If Pillow is told the other byte order, it takes the lower byte of each for the upper one.
    Returns None for other samples and for separate planes.
    """
    modes = {_raw_mode(tile) for tile in source.tile}
    planar = source.tag_v2.get(_TAG.PlanarConfiguration) == 2
    if planar or source.mode not in {"RGB", "RGBA"} or not modes <= _RGB_16:
        return None
    other = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    prepare(other, data)
    order = "B" if sys.byteorder == "little" else "L"
    other.tile = [
        tile._replace(args=(_raw_mode(tile)[:-1] + order, *(tile.args or ())[1:]))
        for tile in other.tile
    ]
    other.load()
    return other


def _raw_mode(tile: ImageFile._Tile) -> str:
    return str(tile.args[0]) if isinstance(tile.args, tuple) else ""


def _tile_size(directories: Directories, directory: int) -> tuple[int, int]:
    """Return width and height of a TIFF file's tiles; 0 if it has none.

    They are read from the bytes of the directory, because Pillow skips entries that libtiff reads.
    If a tag is repeated, the largest value counts. Raises `PictureError` unless the sides are
    single integers.
    """
    sides = {int(_TAG.TileWidth): 0, int(_TAG.TileLength): 0}
    for entry in directories.entries(directory):
        if entry.tag in sides:
            if entry.kind not in {3, 4} or entry.count != 1:
                raise PictureError(
                    "the TIFF file's tile sides are not integers: "
                    f"field type {entry.kind}, count {entry.count}"
                )
            sides[entry.tag] = max(sides[entry.tag], *directories.integers(entry))
    width, height = sides.values()
    return width, height


def _is_raw(directories: Directories, directory: int) -> bool:
    """True if this directory, or one that it refers to, holds samples of a camera's sensor.

    The first directory of a raw file holds only a small picture for display.
    """
    if directories.data[8:10] == b"CR":
        return True
    waiting, seen = [directory], set[int]()
    while waiting and len(seen) < _MAX_DIRECTORIES:
        at = waiting.pop()
        if at == 0 or at in seen or at >= len(directories.data):
            continue
        seen.add(at)
        for entry in directories.entries(at):
            if entry.tag == _DNG_VERSION:
                return True
            if entry.tag == _TAG.PhotometricInterpretation:
                if _RAW_PHOTOMETRIC & set(directories.integers(entry, 1)):
                    return True
            elif entry.tag == _TAG.SubIFDs:
                waiting += directories.integers(entry)
        waiting.append(directories.next(at))
    return False


def _correct_palette(source: TiffImagePlugin.TiffImageFile) -> None:
    """Read a palette of 8 bits, which some scanners write although TIFF demands 16.

    A palette counts as one of 8 bits if all its values are below 256, as in libtiff.
    """
    colours = source.tag_v2.get(_TAG.ColorMap, ())
    if source.mode in {"P", "PA"} and colours and max(colours) < 256:
        source.palette = ImagePalette.raw("RGB;L", bytes(colours))


def as_classic(data: bytes) -> bytes:
    """Rewrite a big-endian BigTIFF file, which Pillow refuses, as a classic TIFF file.

    Pixels stay where they are; a directory with offsets of 32 bits, and its values, are appended.
    Only the first directory is kept. Raises `PictureError` if its fields overlap.
    """
    directories = Directories(data)
    fields, appended = [], bytearray(data)
    appended += bytes(len(appended) % 2)
    for entry in directories.entries(directories.first):
        kind, size = entry.kind, _SIZES.get(entry.kind, 1)
        values = data[entry.at : entry.at + entry.count * size]
        if kind in {16, 18}:  # LONG8, IFD8
            longs = struct.unpack(f">{len(values) // 8}Q", values[: len(values) // 8 * 8])
            values, kind = struct.pack(f">{len(longs)}I", *(min(v, 2**32 - 1) for v in longs)), 4
        inline = values
        if len(values) > 4:
            inline = struct.pack(">I", len(appended))
            appended += values + bytes(len(values) % 2)
            if len(appended) > 3 * len(data):
                raise PictureError("the TIFF file is damaged: its fields overlap")
        fields.append(struct.pack(">HHI4s", entry.tag, kind, entry.count, inline))
    appended[:8] = struct.pack(">2sHI", b"MM", 42, len(appended))
    return bytes(appended) + struct.pack(">H", len(fields)) + b"".join(fields) + bytes(4)


def is_big_endian_bigtiff(data: bytes) -> bool:
    """True if the file is a big-endian BigTIFF file."""
    return data[:4] == b"MM\0\x2b"
