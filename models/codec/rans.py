"""The entropy coder: 64-bit rANS with 32-bit words, 16-bit frequencies and 4-bit bypass digits.

Wire-compatible with CompressAI's coder (Duda 2013; F. Giesen's `rans64`), but every read is
bounds-checked and the end state is verified: an encoder starts at `STATE_LOW`, so a decoder that
stayed in step ends there with every word consumed.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.errors import CorruptStream, DesynchronisedStream

PRECISION = 16
"""Bits of a frequency: every CDF ends at 65536."""
STATE_LOW = 1 << 31
"""The state an encoder starts from, and the lower end of the normalised interval."""

LARGEST = (1 << 30) - 1
"""Largest symbol that is coded, the smallest being -2^30: what 8 bypass digits always hold."""

OFFSET_MAX = 1 << 28
"""Bound of a CDF's first symbol, so that a difference from it still fits 8 bypass digits."""

_OK, _SHORT, _BYPASS, _STATE, _TRAILING = range(5)

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tables:
    """CDFs of all contexts, as CompressAI's `update()` makes them.

    `cdf` (contexts, width) holds cumulative frequencies; the last symbol of a row escapes to bypass
    digits. `length` (contexts,) counts a row's entries, `offset` (contexts,) is its first symbol.
    Raises `ValueError` where a row is no CDF, or an offset exceeds `OFFSET_MAX`.
    """

    cdf: Int32Array
    length: Int32Array
    offset: Int32Array

    def __post_init__(self) -> None:
        n, width = self.cdf.shape
        if self.length.shape != (n,) or self.offset.shape != (n,):
            raise ValueError("cdf, length and offset disagree about the number of contexts")
        if n == 0 or self.length.min() < 3 or self.length.max() > width:
            raise ValueError("a CDF's length lies outside its row")
        if self.offset.min() < -OFFSET_MAX or self.offset.max() > OFFSET_MAX:
            raise ValueError("a CDF begins at a symbol out of all range")
        for row, size in zip(self.cdf, self.length, strict=True):
            rises = (row[1:size] > row[: size - 1]).all()  # a difference might wrap
            if row[0] != 0 or row[size - 1] != 1 << PRECISION or not rises:
                raise ValueError("a CDF must rise strictly from 0 to 65536")


@njit(cache=True, nogil=True)
def _refill(x, words, position):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Renormalise the state; `position` runs past the end where words are missing."""
    if x >= np.uint64(1 << 31):
        return x, position
    word = words[position] if position < words.size else np.uint32(0)
    return (x << np.uint64(32)) | np.uint64(word), position + 1


@njit(cache=True, nogil=True)
def _raw(value, escape):  # type: ignore[no-untyped-def]  # pragma: no cover
    """What the bypass digits of a value hold; -1 where it has a frequency of its own."""
    if 0 <= value < escape:
        return np.int64(-1)
    return -2 * value - 1 if value < 0 else 2 * (value - escape)


@njit(cache=True, nogil=True)
def _bypass(x, words, position):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Read a count, then as many digits, the lowest first: state, position, raw (-1: invalid).

    CompressAI writes a count of 15 or more in several digits, but no value needs more than 8.
    """
    count = np.int64(x & np.uint64(15))
    x, position = _refill(x >> np.uint64(4), words, position)
    if count > 8:
        return x, position, np.int64(-1)
    raw = digit = np.int64(0)
    for j in range(count):
        digit = np.int64(x & np.uint64(15))
        raw |= digit << np.int64(4 * j)
        x, position = _refill(x >> np.uint64(4), words, position)
    if count > 0 and digit == 0:  # a leading zero: no encoder writes it
        raw = np.int64(-1)
    return x, position, raw


@njit(cache=True, nogil=True)
def _decode(words, indexes, cdf, length, offset, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    x = np.uint64(words[0]) | (np.uint64(words[1]) << np.uint64(32))
    position = 2
    for i in range(indexes.size):
        row = indexes[i]
        target = np.int32(x & np.uint64(0xFFFF))
        low, high = 0, length[row] - 1  # cdf[low] <= target < cdf[high]
        while high - low > 1:
            middle = (low + high) >> 1
            if cdf[row, middle] <= target:
                low = middle
            else:
                high = middle
        start = cdf[row, low]
        x = np.uint64(cdf[row, low + 1] - start) * (x >> np.uint64(16)) + np.uint64(target - start)
        x, position = _refill(x, words, position)
        value = np.int64(low)
        escape = np.int64(length[row] - 2)
        if value == escape:
            x, position, raw = _bypass(x, words, position)
            if raw < 0:
                return _SHORT if position > words.size else _BYPASS
            value = -(raw >> 1) - 1 if raw & 1 else (raw >> 1) + escape
        if position > words.size:
            return _SHORT
        value += offset[row]
        if value > LARGEST or value < -LARGEST - 1:
            return _BYPASS
        out[i] = value
    if x != np.uint64(1 << 31):
        return _STATE
    return _OK if position == words.size else _TRAILING


@njit(cache=True, nogil=True)
def _encode(symbols, indexes, cdf, length, offset, words):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Write from the end of `words` to its beginning; the first position that is used."""
    x = np.uint64(1 << 31)
    position = words.size
    digits = np.empty(16, np.int64)
    for i in range(symbols.size - 1, -1, -1):
        row = indexes[i]
        escape = np.int64(length[row] - 2)
        value = np.int64(symbols[i]) - np.int64(offset[row])
        raw = _raw(value, escape)
        n = 0
        if raw >= 0:
            value = escape
            while raw >> np.int64(4 * n) != 0:
                digits[n + 1] = (raw >> np.int64(4 * n)) & 15
                n += 1
            digits[0] = n  # at most 8: below 15, so one digit tells it
            n += 1
        for j in range(n - 1, -1, -1):
            if x >= np.uint64(1 << 59):
                position -= 1
                words[position] = np.uint32(x & np.uint64(0xFFFFFFFF))
                x >>= np.uint64(32)
            x = (x << np.uint64(4)) | np.uint64(digits[j])
        start = np.uint64(cdf[row, value])
        frequency = np.uint64(cdf[row, value + 1]) - start
        if x >= frequency << np.uint64(47):
            position -= 1
            words[position] = np.uint32(x & np.uint64(0xFFFFFFFF))
            x >>= np.uint64(32)
        x = ((x // frequency) << np.uint64(16)) + x % frequency + start
    position -= 2
    words[position] = np.uint32(x & np.uint64(0xFFFFFFFF))
    words[position + 1] = np.uint32(x >> np.uint64(32))
    return position


@njit(cache=True, nogil=True)
def _bits(symbols, indexes, cdf, length, offset, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for i in range(symbols.size):
        row = indexes[i]
        escape = np.int64(length[row] - 2)
        value = np.int64(symbols[i]) - np.int64(offset[row])
        raw = _raw(value, escape)
        bits = 16.0
        if raw >= 0:
            value = escape
            bits += 4.0
            while raw != 0:
                bits += 4.0
                raw >>= 4
        out[i] = bits - np.log2(np.float64(cdf[row, value + 1] - cdf[row, value]))


def words_of(data: bytes) -> NDArray[np.uint32]:
    """The 32-bit words of entropy coded `data`, first the state that the encoder ended in.

    Raises `CorruptStream` where no tables and contexts whatever can decode them.
    """
    if len(data) % 4 or len(data) < 8:
        raise CorruptStream(f"{len(data)} entropy coded bytes: not two or more 32-bit words")
    if not STATE_LOW <= int.from_bytes(data[:8], "little") < 1 << 63:
        raise CorruptStream("the entropy coded bytes begin with a state that no encoder reaches")
    return np.frombuffer(data, "<u4")


def decode(data: bytes, indexes: Int32Array, tables: Tables) -> Int32Array:
    """Entropy coded `data` -> symbols, int32 of the shape of `indexes` (one context each).

    Raises `CorruptStream` where the bytes end early, are no whole words or hold an impossible
    escape, `DesynchronisedStream` where all symbols were read but the end state does not hold.
    """
    words, contexts = words_of(data), _contexts(indexes, tables)
    out = np.empty(contexts.size, np.int32)
    status = _decode(words, contexts, tables.cdf, tables.length, tables.offset, out)
    if status == _SHORT:
        raise CorruptStream("the entropy coded bytes end before the last symbol")
    if status == _BYPASS:
        raise CorruptStream("an escape code holds a value that no encoder writes")
    if status == _STATE:
        raise DesynchronisedStream("the entropy decoder did not end at the encoder's initial state")
    if status == _TRAILING:
        raise DesynchronisedStream("entropy coded bytes remain after the last symbol")
    return out.reshape(indexes.shape)


def encode(symbols: Int32Array, indexes: Int32Array, tables: Tables) -> bytes:
    """`symbols` (int32) in contexts `indexes` (same shape) -> bytes that `decode` reverses.

    Raises `ValueError` where a symbol lies outside 31 bits, or shapes disagree.
    """
    flat, contexts = _flat(symbols, indexes), _contexts(indexes, tables)
    words = np.empty(flat.size * 2 + 4, np.uint32)  # at most 16 + 9·4 bits a symbol
    at = _encode(flat, contexts, tables.cdf, tables.length, tables.offset, words)
    return words[at:].astype("<u4", copy=False).tobytes()


def bits(symbols: Int32Array, indexes: Int32Array, tables: Tables) -> NDArray[np.float32]:
    """Bits that each symbol costs in its context: float32 of the shape of `symbols`.

    Raises `ValueError` as `encode` does.
    """
    flat, contexts = _flat(symbols, indexes), _contexts(indexes, tables)
    out = np.empty(flat.size, np.float32)
    _bits(flat, contexts, tables.cdf, tables.length, tables.offset, out)
    return out.reshape(symbols.shape)


def _contexts(indexes: Int32Array, tables: Tables) -> Int32Array:
    if indexes.size and not 0 <= indexes.min() <= indexes.max() < len(tables.cdf):
        raise ValueError(f"contexts must lie in 0…{len(tables.cdf) - 1}")
    return np.ascontiguousarray(indexes, np.int32).reshape(-1)


def _flat(symbols: Int32Array, indexes: Int32Array) -> Int32Array:
    if symbols.shape != indexes.shape:
        raise ValueError(f"{symbols.shape} symbols for {indexes.shape} contexts")
    if symbols.size and not -LARGEST - 1 <= symbols.min() <= symbols.max() <= LARGEST:
        raise ValueError("a symbol lies outside 31 bits")
    return np.ascontiguousarray(symbols, np.int32).reshape(-1)
