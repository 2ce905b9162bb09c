"""Reads the colours and the clean aperture of AVIF and HEIC files.

Boxes are specified in ISO/IEC 14496-12 and 23008-12.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from models.pictures import color
from models.pictures.color import Colour

Box = tuple[bytes, bytes]
"""Type and content."""
_MAX_BOXES = 10_000


@dataclass(frozen=True, slots=True)
class Properties:
    """Properties of a file's main picture that Pillow does not return."""

    codes: tuple[int, int] | None = None  # colour primaries and transfer function
    aperture: tuple[Fraction, ...] | None = None  # width, height, horizontal and vertical shift

    def colour(self) -> Colour | None:
        """Return the colours; None without codes. Raises `UnsupportedPicture` for HDR."""
        return color.from_codes(*self.codes) if self.codes else None

    def crop(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Return the clean aperture as left, top, right, bottom; None for the whole picture.

        ISO/IEC 14496-12, 12.1.4. An aperture that is not within the picture is ignored.
        """
        if self.aperture is None:
            return None
        wide, high, right, down = self.aperture
        left = round(right + Fraction(width - 1, 2) - (wide - 1) / 2)
        top = round(down + Fraction(height - 1, 2) - (high - 1) / 2)
        box = (left, top, left + int(wide), top + int(high))
        inside = 0 <= left < box[2] <= width and 0 <= top < box[3] <= height
        return box if inside and box != (0, 0, width, height) else None


def properties(data: bytes) -> Properties:
    """Read the properties of the main picture; broken ones are left out."""
    try:
        boxes = _main_properties(data)
    except (struct.error, IndexError):
        boxes = []
    codes, aperture = None, None
    for name, content in boxes:
        if name == b"colr" and content[:4] == b"nclx" and len(content) >= 10:
            codes = struct.unpack(">HH", content[4:8])
        if name == b"clap" and len(content) == 32:
            aperture = _aperture(content)
    return Properties(codes, aperture)


def _aperture(content: bytes) -> tuple[Fraction, ...] | None:
    numbers = struct.unpack(">IIIIiIiI", content)
    if 0 in numbers[1::2]:
        return None
    return tuple(Fraction(n, d) for n, d in zip(numbers[::2], numbers[1::2], strict=True))


def _main_properties(data: bytes) -> list[Box]:
    """Return the properties of the main item; without one, the boxes of the first track."""
    top = dict(reversed(list(_boxes(data))))
    meta = dict(reversed(list(_boxes(top.get(b"meta", b"")[4:]))))
    if b"pitm" in meta and b"iprp" in meta:
        pitm = meta[b"pitm"]
        item = int.from_bytes(pitm[4:6] if pitm[0] == 0 else pitm[4:8], "big")
        return _item_properties(meta[b"iprp"], item)
    content = top.get(b"moov", b"")
    for name, skip in (
        (b"trak", 0), (b"mdia", 0), (b"minf", 0), (b"stbl", 0), (b"stsd", 0), (b"av01", 8)
    ):  # fmt: skip
        content = dict(reversed(list(_boxes(content[skip:])))).get(name, b"")
    return list(_boxes(content[78:]))  # after the fields of a visual sample entry


def _item_properties(iprp: bytes, item: int) -> list[Box]:
    """Return the properties that box `ipma` associates with the item."""
    parts = list(_boxes(iprp))
    known = [box for name, content in parts if name == b"ipco" for box in _boxes(content)]
    return [
        known[index - 1]
        for name, content in parts
        if name == b"ipma"
        for index in _associated(content, item)
        if 0 < index <= len(known)
    ]


def _associated(ipma: bytes, item: int) -> Iterator[int]:
    """Yield the indices of the item's properties (ISO/IEC 23008-12, 9.3.1)."""
    id_size = 2 if ipma[0] == 0 else 4
    wide = ipma[3] & 1
    count, at = int.from_bytes(ipma[4:8], "big"), 8
    for _ in range(min(count, len(ipma))):
        entry = int.from_bytes(ipma[at : at + id_size], "big")
        number = ipma[at + id_size]
        at += id_size + 1
        size = 2 if wide else 1
        if entry == item:
            for start in range(at, at + number * size, size):
                value = int.from_bytes(ipma[start : start + size], "big")
                yield value & (0x7FFF if wide else 0x7F)
        at += number * size


def _boxes(data: bytes) -> Iterator[Box]:
    """Yield the boxes in the content of a box, or in a file."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            return
        size, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1 and start + 8 <= len(data):
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        end = len(data) if size == 0 else at + size
        if end < start:
            return
        yield name, data[start:end]
        at = end
