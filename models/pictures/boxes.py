"""Boxes of AVIF, HEIC and JPEG XL files: colours, clean aperture, and sizes that are missing.

They are specified in ISO/IEC 14496-12 and 23008-12.
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
    top = dict(reversed(list(boxes(data))))
    meta = dict(reversed(list(boxes(top.get(b"meta", b"")[4:]))))
    if b"pitm" in meta and b"iprp" in meta:
        return _item_properties(meta[b"iprp"], _main_item(meta[b"pitm"]))
    content = top.get(b"moov", b"")
    for name, skip in (
        (b"trak", 0), (b"mdia", 0), (b"minf", 0), (b"stbl", 0), (b"stsd", 0), (b"av01", 8)
    ):  # fmt: skip
        content = dict(reversed(list(boxes(content[skip:])))).get(name, b"")
    return list(boxes(content[78:]))  # after the fields of a visual sample entry


def _main_item(pitm: bytes) -> int:
    return int.from_bytes(pitm[4:6] if pitm[0] == 0 else pitm[4:8], "big")


def _item_properties(iprp: bytes, item: int) -> list[Box]:
    """Return the properties that box `ipma` associates with the item."""
    parts = list(boxes(iprp))
    known = [box for name, content in parts if name == b"ipco" for box in boxes(content)]
    return [
        known[index - 1]
        for name, content in parts
        if name == b"ipma"
        for entry, indices in _associations(content)
        if entry == item
        for index in indices
        if 0 < index <= len(known)
    ]


def _associations(ipma: bytes) -> Iterator[tuple[int, list[int]]]:
    """Yield each item and the indices of its properties (ISO/IEC 23008-12, 9.3.1)."""
    id_size, size, mask = _widths(ipma)
    count, at = int.from_bytes(ipma[4:8], "big"), 8
    for _ in range(min(count, len(ipma))):
        item = int.from_bytes(ipma[at : at + id_size], "big")
        number = ipma[at + id_size]
        at += id_size + 1
        starts = range(at, at + number * size, size)
        yield item, [int.from_bytes(ipma[s : s + size], "big") & mask for s in starts]
        at += number * size


def _widths(ipma: bytes) -> tuple[int, int, int]:
    """Bytes of an item's number and of an association, and the mask of its index."""
    wide = ipma[3] & 1
    return 2 if ipma[0] == 0 else 4, 2 if wide else 1, 0x7FFF if wide else 0x7F


def is_truncated(data: bytes) -> bool:
    """True if a box of the file ends behind the data."""
    return any(end > len(data) for _, _, _, end in spans(data))


def with_auxiliary_sizes(data: bytes) -> bytes:
    """Give auxiliary pictures, such as alpha, the size (property ispe) of the main one if they lack
    it: libavif refuses them otherwise. A file without such pictures is returned as it is.

    The new box `meta` is appended, and the old one becomes free space, so that all offsets in the
    file stay valid.
    """
    try:
        places = {name: place for name, *place in reversed(list(spans(data)))}
        old, start, end = places[b"meta"]
        parts = list(boxes(data[start + 4 : end]))
        item = _main_item(dict(parts)[b"pitm"])
        new = [(n, _sized(c, item) if n == b"iprp" else c) for n, c in parts]
    except (struct.error, IndexError, KeyError):
        return data
    if new == parts or is_truncated(data):
        return data
    out = bytearray(data)
    out[old + 4 : old + 8] = b"free"
    last = max(at for at, _, _ in places.values())
    if out[last : last + 4] == bytes(4):  # its content goes to the end of the file
        out[last : last + 4] = struct.pack(">I", len(data) - last)
    return bytes(out) + _box(b"meta", data[start : start + 4] + b"".join(_box(*b) for b in new))


def _sized(iprp: bytes, main: int) -> bytes:
    """Return box `iprp` with the main item's size for auxiliary items that lack one."""
    parts = list(boxes(iprp))
    names = [name for part, content in parts if part == b"ipco" for name, _ in boxes(content)]

    def index_of(name: bytes, indices: list[int]) -> int:
        return next((i for i in indices if 0 < i <= len(names) and names[i - 1] == name), 0)

    tables = [dict(_associations(content)) for name, content in parts if name == b"ipma"]
    size = next((s for t in tables if (s := index_of(b"ispe", t.get(main, [])))), 0)
    lacking = {
        item
        for table in tables
        for item, indices in table.items()
        if size and index_of(b"auxC", indices) and not index_of(b"ispe", indices)
    }
    return b"".join(
        _box(name, _extended(content, lacking, size) if name == b"ipma" else content)
        for name, content in parts
    )


def _extended(ipma: bytes, items: set[int], index: int) -> bytes:
    """Return box `ipma` with one more property for these items."""
    id_size, size, _ = _widths(ipma)
    out, at = bytearray(ipma[:8]), 8
    for item, indices in _associations(ipma):
        end = at + id_size + 1 + len(indices) * size
        entry = bytearray(ipma[at:end])
        if item in items:
            entry[id_size] += 1
            entry += index.to_bytes(size, "big")
        out += entry
        at = end
    return bytes(out)


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def boxes(data: bytes) -> Iterator[Box]:
    """Yield the boxes in the content of a box, or in a file."""
    for name, _, start, end in spans(data):
        yield name, data[start:end]


def spans(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield type, and offsets of the box, its content and its end, of each box.

    The end of a truncated box lies behind the data.
    """
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
        yield name, at, start, end
        at = end
