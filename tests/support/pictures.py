"""Builds picture files of kinds that Pillow does not write."""

import struct
import zlib


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(
    kind: int, depth: int, row: bytes, *chunks: bytes, width: int = 1, height: int = 1
) -> bytes:
    """A PNG of colour type `kind` with `height` equal rows; `chunks` precede the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""TIFF field type -> code of `struct`: BYTE, SHORT, LONG, LONG8."""
Tags = dict[int, tuple[int, list[int]]]
"""TIFF tag -> field type and values."""


def tiff(tags: Tags, pixels: bytes, order: str = "<", big: bool = False) -> bytes:
    """A TIFF or BigTIFF file of one strip. `order` is "<" or ">"."""
    word = "Q" if big else "I"
    size = struct.calcsize(f"={word}")
    count = len(tags) + 2
    start = (16 + 8 + 20 * count + 8) if big else (8 + 2 + 12 * count + 4)
    kind = 16 if big else 4
    fields, behind = b"", b""
    total = sum(
        len(v) * struct.calcsize("=" + _CODES[k])
        for k, v in tags.values()
        if len(v) * struct.calcsize("=" + _CODES[k]) > size
    )
    strips: Tags = {273: (kind, [start + total]), 279: (kind, [len(pixels)])}
    for tag, (field, values) in sorted((tags | strips).items()):
        packed = struct.pack(f"{order}{len(values)}{_CODES[field]}", *values)
        inline = packed.ljust(size, b"\0")
        if len(packed) > size:
            inline = struct.pack(order + word, start + len(behind))
            behind += packed
        fields += struct.pack(f"{order}HH{word}", tag, field, len(values)) + inline
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, count)
    else:
        head = mark + struct.pack(f"{order}HIH", 42, 8, count)
    return head + fields + bytes(size) + behind + pixels


def grey_tags(width: int, height: int, depth: int = 8) -> Tags:
    """The tags of an uncompressed grey picture."""
    return {
        256: (3, [width]), 257: (3, [height]), 258: (3, [depth]), 259: (3, [1]), 262: (3, [1]),
        277: (3, [1]), 278: (3, [height]),
    }  # fmt: skip


def rgb_tags(width: int, height: int, depth: int = 8) -> Tags:
    """The tags of an uncompressed RGB picture."""
    return grey_tags(width, height) | {258: (3, [depth] * 3), 262: (3, [2]), 277: (3, [3])}
