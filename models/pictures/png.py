"""PNG files: reads the chunks that matter, and samples of 16 bits, which Pillow cuts to 8.

Pillow gets only the chunks that it needs for the pixels, since it refuses pictures with long or
broken texts. An ancillary chunk with a wrong checksum is ignored, as in browsers.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import PictureError, UnsupportedPicture
from models.geometry import check_size
from models.pictures import color
from models.pictures.color import Colour
from models.pictures.signatures import PNG

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type -> samples of a pixel."""
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Colour type -> allowed bits of a sample."""
_GREY, _RGB, _PALETTE = 0, 2, 3
_MAX_PROFILE = 32 * 2**20
"""Limit on the bytes of an ICC profile; a longer one is ignored."""
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip
"""Passes of an interlaced file: first column and row, distance of columns and rows."""


@dataclass(slots=True)
class Png:
    """The header and the chunks of a PNG file that are used."""

    width: int
    height: int
    depth: int
    kind: int
    interlaced: bool
    idat: list[memoryview] = field(default_factory=list)
    other: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def exif(self) -> bytes:
        return self.other.get(b"eXIf", b"")

    @property
    def has_alpha(self) -> bool:
        return self.kind in {4, 6}

    def file(self) -> io.BytesIO:
        """Return a PNG file with only the chunks that are needed for the pixels."""
        out = io.BytesIO()
        out.write(PNG + _chunk(b"IHDR", self.other[b"IHDR"]))
        if self.kind == _PALETTE:
            for name in (b"PLTE", b"tRNS"):
                if name in self.other:
                    out.write(_chunk(name, self.other[name]))
        for part in self.idat:
            out.write(struct.pack(">I4s", len(part), b"IDAT"))
            out.write(part)
            out.write(bytes(4))  # the checksum, which Pillow does not read here
        out.write(_chunk(b"IEND", b""))
        out.seek(0)
        return out

    def colour(self) -> Colour | bytes | None:
        """Return the colours or an ICC profile; None for sRGB.

        The order is that of the PNG specification (third edition, 4.3): cICP, iCCP, sRGB, and then
        gAMA with cHRM. Raises `UnsupportedPicture` for HDR.
        """
        codes = self.other.get(b"cICP", b"")
        if len(codes) == 4 and codes[2] == 0:
            return color.from_codes(codes[0], codes[1], codes[3] != 0)
        if profile := _profile(self.other.get(b"iCCP", b"")):
            return profile
        if b"sRGB" in self.other:
            return None
        gamma, points = self.other.get(b"gAMA", b""), self.other.get(b"cHRM", b"")
        white_first = [v / 1e5 for v in struct.unpack(">8I", points)] if len(points) == 32 else []
        return color.from_gamma(
            int.from_bytes(gamma, "big") / 1e5 if len(gamma) == 4 else None,
            tuple(white_first[2:] + white_first[:2]) or None,
        )

    def transparent(self) -> tuple[int, ...] | None:
        """Return the sample values of the transparent colour of a grey or RGB picture."""
        size = {_GREY: 2, _RGB: 6}.get(self.kind)
        content = self.other.get(b"tRNS", b"")
        if size is None or len(content) != size:
            return None
        mask = (1 << self.depth) - 1
        return tuple(v & mask for v in struct.unpack(f">{size // 2}H", content))

    def samples(self) -> tuple[NDArray[np.uint16], bool]:
        """Decode a file of 16 bits to samples (H, W, channels); False if pixels are missing.

        PNG's filters work on single bytes: each is predicted from the same byte of neighbouring
        pixels. So the upper bytes of all samples form a PNG of 8 bits with the same filters, and so
        do the lower bytes. Pillow decodes both.
        """
        channels = _CHANNELS[self.kind]
        out = np.zeros((self.height, self.width, channels), np.uint16)
        passes = _PASSES if self.interlaced else ((0, 0, 1, 1),)
        parts = [part for x, y, dx, dy in passes if (part := out[y::dy, x::dx]).size]
        size = sum(len(part) * (1 + part[0].size * 2) for part in parts)
        raw = zlib.decompressobj().decompress(b"".join(self.idat), size)
        complete, at = len(raw) == size, 0
        raw = raw.ljust(size, b"\0")
        for part in parts:
            height, width = part.shape[:2]
            rows = np.frombuffer(raw, np.uint8, height * (1 + width * 2 * channels), at)
            at += rows.size
            rows = rows.reshape(height, -1)
            upper, lower = (
                self._bytes_of(rows[:, :1], rows[:, start::2], part.shape) for start in (1, 2)
            )
            part[...] = upper.astype(np.uint16) << 8 | lower
        return out, complete

    def _bytes_of(
        self, filters: NDArray[np.uint8], body: NDArray[np.uint8], shape: tuple[int, ...]
    ) -> NDArray[np.uint8]:
        """Undo the filters of the upper or lower bytes of all samples."""
        head = struct.pack(">IIBBBBB", shape[1], shape[0], 8, self.kind, 0, 0, 0)
        stream = zlib.compress(np.concatenate([filters, body], 1).tobytes(), 0)
        data = PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return np.asarray(picture).reshape(shape)


def parse(data: bytes, max_pixels: int) -> Png:
    """Read a PNG file's chunks.

    Raises `PictureError` if a chunk that is needed is broken, `PictureTooLarge` for more than
    `max_pixels`.
    """
    chunks = _chunks(data)
    png = _header(chunks)
    check_size(png.height, png.width, max_pixels)
    for name, content, whole in chunks:
        if name == b"IDAT":
            png.idat.append(content)
        elif name == b"PLTE" and not whole and png.kind == _PALETTE:
            raise PictureError("the PNG file is broken: its chunk PLTE has a wrong checksum")
        elif whole and name in _USED and name not in png.other:
            png.other[name] = bytes(content)
    if not png.idat:
        raise PictureError("the PNG file is broken or truncated: it has no chunk IDAT")
    if png.kind == _PALETTE and b"PLTE" not in png.other:
        raise PictureError("the PNG file is broken: it has no palette (chunk PLTE)")
    return png


def _header(chunks: Iterator[tuple[bytes, memoryview, bool]]) -> Png:
    """Read the first chunk, IHDR."""
    name, content, whole = next(chunks, (b"", memoryview(b""), False))
    if name == b"CgBI":
        raise UnsupportedPicture("Apple's CgBI variant of PNG is not read; use a standard PNG")
    if name != b"IHDR" or len(content) != 13:
        raise PictureError("the PNG file is broken: its first chunk is not IHDR with 13 bytes")
    if not whole:
        raise PictureError("the PNG file is broken: its chunk IHDR has a wrong checksum")
    width, height, depth, kind, interlaced = struct.unpack(">IIBBxx?", content)
    if depth not in _DEPTHS.get(kind, ()):
        raise PictureError(
            f"the PNG file is broken: colour type {kind} with {depth} bits does not exist"
        )
    return Png(width, height, depth, kind, interlaced, other={name: bytes(content)})


_USED = {b"PLTE", b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"}


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Yield name, content, and True if the checksum is right, of each chunk before IEND.

    For IDAT and for chunks that are not used, the third value is False: their checksums are not
    computed. The last chunk of a truncated file may be short.
    """
    view, at = memoryview(data), len(PNG)
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if not name.isalpha() or name == b"IEND":
            return
        content = view[at + 8 : at + 8 + size]
        end = at + 8 + size
        whole = name in _USED or name == b"IHDR"
        if whole:
            whole = zlib.crc32(view[at + 4 : end]).to_bytes(4, "big") == data[end : end + 4]
        yield name, content, whole
        at = end + 4


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I4s", len(content), name) + content + struct.pack(">I", checksum)


def _profile(content: bytes) -> bytes | None:
    """Return the ICC profile of a chunk iCCP: a name, a 0, the method 0, a zlib stream."""
    _, _, packed = content.partition(b"\0")
    if packed[:1] != b"\0":
        return None
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], _MAX_PROFILE)
    except zlib.error:
        return None
    return profile if unpacker.eof else None
