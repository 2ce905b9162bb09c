"""Make seed bitstreams and mutate them."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np

from models.codec import bitstream, codec
from models.codec.architectures import DEFAULT
from models.codec.bitstream import Bitstream, Format, Profile
from models.codec.codec import Codec
from models.codec.rans import Int32Array
from models.image import Pixels

KINDS: tuple[tuple[Format, Profile], ...] = (
    ("msh", "exact"),
    ("compressai", "float"),
    ("msh", "float"),
    ("compressai", "float"),
)
"""Half of all inputs have CompressAI's format, a quarter each is `.msh` with either profile."""
VERSIONS = ("1.2.2 and later", "1.2.0 to 1.2.1", "1.0.3 to 1.1.9")
"""Versions of CompressAI with different layouts. Crops are written in one after the other."""
CLASSES = ("one bit", "one byte", "several bytes", "header")
"""Classes of mutations, by which results are counted."""

_MSH_CRC = slice(32, 36)
_COMPRESSAI_HEADER = 23
"""In the oldest layout, this includes the first byte after the header."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid file and the symbols it decodes to."""

    data: bytes
    parsed: Bitstream
    symbols: Int32Array


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed file, its class in `CLASSES`, and whether its CRC-32C was recomputed to match."""

    data: bytes
    seed: Seed
    kind: str
    recomputed: bool


def seeds(codecs: list[Codec], photo: Pixels, cuts: int, sides: tuple[int, int]) -> list[Seed]:
    """Encode `cuts` random crops of `photo` in every format and profile with every codec.

    Their sides lie within `sides`. Files of CompressAI take turns in `VERSIONS`. One crop is
    replaced by noise, which has large symbols.
    """
    rng = np.random.default_rng(0)
    result = []
    for i in range(cuts):
        height, width = (
            int(rng.integers(min(sides[0], n), min(sides[1], n) + 1)) for n in photo.shape[:2]
        )
        top, left = (
            int(rng.integers(0, n - side + 1))
            for n, side in zip(photo.shape[:2], (height, width), strict=True)
        )
        pixels = np.ascontiguousarray(
            photo[top : top + height, left : left + width][:, :: (-1) ** i]
        )
        if i == 1:
            pixels = rng.integers(0, 256, pixels.shape, np.uint8)
        for c in codecs:
            for format, profile in dict.fromkeys(KINDS):
                if format == "msh" and c.model != DEFAULT:
                    continue
                b = c.encode(codec.to_tensor(pixels), format, profile)
                if format == "compressai":
                    old = VERSIONS if c.model in bitstream.OLD_MODELS else VERSIONS[:1]
                    b = replace(b, versions=old[i % len(old)])
                result.append(Seed(bitstream.serialize(b), b, c.latents(b).symbols))
    return result


def mutant(rng: random.Random, of: list[Seed]) -> Mutant:
    """Return a random mutation of one of the seeds, which differs from it."""
    kinds = {(s.parsed.format, s.parsed.profile) for s in of}
    kind = rng.choice([kind for kind in KINDS if kind in kinds])
    candidates = [s for s in of if (s.parsed.format, s.parsed.profile) == kind]
    while True:
        seed = rng.choice(candidates)
        recompute = rng.random() < 0.5
        if rng.random() < 0.17:
            name, data = "header", _header(rng, seed)
        else:
            name, data = _strings(rng, seed, rng.choice(candidates))
        if seed.parsed.format == "msh" and len(data) >= 36:
            data = _with_checksum(data) if recompute else _with_checksum_of(seed, data)
        if data != seed.data:
            return Mutant(data, seed, name, recompute)


def _strings(rng: random.Random, seed: Seed, other: Seed) -> tuple[str, bytes]:
    """Change one of the strings; return the class and a file whose header has the right lengths."""
    has_z = bool(seed.parsed.z_string)
    name = rng.choice(("y_string", "y_string", "z_string" if has_z else "y_string"))
    old = getattr(seed.parsed, name)
    if rng.random() < 0.6:
        of_class, changed = rng.choice((("one bit", _bit), ("one byte", _byte)))
        new = changed(rng, old)
    else:
        of_class = "several bytes"
        new = rng.choice(_CHANGES)(rng, old, getattr(other.parsed, name))
    strings: dict[str, Any] = {name: new}
    return of_class, bitstream.serialize(replace(seed.parsed, **strings))


def _bit(rng: random.Random, s: bytes) -> bytes:
    bad = bytearray(s)
    bit = rng.randrange(8 * len(s))
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


def _byte(rng: random.Random, s: bytes) -> bytes:
    bad = bytearray(s)
    bad[rng.randrange(len(s))] = rng.randrange(256)
    return bytes(bad)


def _span(rng: random.Random, s: bytes) -> slice:
    at = rng.randrange(len(s) + 1)
    return slice(at, at + min(rng.choice((1, 2, 4, 4, 8, 16, 64)), len(s) - at))


def _overwrite(rng: random.Random, s: bytes, _: bytes) -> bytes:
    at = _span(rng, s)
    n = at.stop - at.start
    filling = rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n))
    return s[: at.start] + filling + s[at.stop :]


def _scatter(rng: random.Random, s: bytes, _: bytes) -> bytes:
    for _i in range(rng.randrange(2, 9)):
        s = _byte(rng, s)
    return s


def _delete(rng: random.Random, s: bytes, _: bytes) -> bytes:
    at = _span(rng, s)
    return s[: at.start] + s[at.stop :]


def _insert(rng: random.Random, s: bytes, _: bytes) -> bytes:
    at = _span(rng, s)
    return s[: at.start] + rng.choice((s[at], rng.randbytes(at.stop - at.start))) + s[at.start :]


def _truncate(rng: random.Random, s: bytes, _: bytes) -> bytes:
    end = rng.randrange(len(s))
    return s[: rng.choice((end, end & ~3))]


def _extend(rng: random.Random, s: bytes, _: bytes) -> bytes:
    n = rng.choice((1, 2, 4, 8, 1024))
    return s + rng.choice((bytes(n), rng.randbytes(n)))


def _swap_words(rng: random.Random, s: bytes, _: bytes) -> bytes:
    words = [s[i : i + 4] for i in range(0, len(s), 4)]
    i, j = rng.randrange(len(words)), rng.randrange(len(words))
    words[i], words[j] = words[j], words[i]
    return b"".join(words)


def _splice(rng: random.Random, s: bytes, other: bytes) -> bytes:
    at = rng.randrange(min(len(s), len(other)) + 1)
    return s[:at] + other[at:]


def _replace(rng: random.Random, s: bytes, other: bytes) -> bytes:
    return rng.choice((other, rng.randbytes(len(s)), bytes(len(s)), s[::-1]))


_CHANGES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _overwrite, _scatter, _delete, _insert, _truncate, _extend, _swap_words, _splice, _replace,
)  # fmt: skip


def _header(rng: random.Random, seed: Seed) -> bytes:
    """Change fields or bytes of the header."""
    b = seed.parsed
    if rng.random() < 0.5:
        side = rng.choice(("height", "width"))
        changes: dict[str, Any] = rng.choice(
            (
                {side: getattr(b, side) + rng.choice((-1, 1))},
                {side: max(1, getattr(b, side) + rng.randrange(-80, 81))},
                {side: rng.choice((1, 64, 4096, 65535, 2**31, 2**32 - 1))},
                {"height": b.width, "width": b.height},
                {"quality": rng.randrange(1, 9)},
                {"metric": rng.choice(bitstream.METRICS)},
                {"y_string": b.z_string, "z_string": b.y_string},
            )
        )
        return bitstream.serialize(replace(b, **changes))
    size = 36 if b.format == "msh" else _COMPRESSAI_HEADER
    at = rng.randrange(size)
    n = min(rng.choice((1, 1, 2, 4)), size - at)
    new = rng.choice(
        (rng.randbytes(n), bytes(n), b"\xff" * n, struct.pack(">I", rng.randrange(200))[-n:])
    )
    head = seed.data[:at] + new + seed.data[at + n :]
    return rng.choice((head, head, seed.data[:at], head + rng.randbytes(3)))


def _with_checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data[: _MSH_CRC.start] + data[_MSH_CRC.stop :])
    return data[: _MSH_CRC.start] + struct.pack("<I", crc) + data[_MSH_CRC.stop :]


def _with_checksum_of(seed: Seed, data: bytes) -> bytes:
    return data[: _MSH_CRC.start] + seed.data[_MSH_CRC] + data[_MSH_CRC.stop :]
