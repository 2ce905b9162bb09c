"""Entropy coder: 64-bit rANS with 32-bit words, 16-bit frequencies and 4-bit bypass digits.

It is wire-compatible with CompressAI's coder (Duda 2013; F. Giesen's `rans64`). In addition every
read is bounds-checked and the end state is verified: an encoder starts at `STATE_LOW`, so a decoder
that used the right CDFs ends there with all words consumed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.codec.compiled import compiled
from models.errors import CorruptStream, DesynchronisedStream

PRECISION = 16
"""Bits per frequency: every CDF ends at 65536."""
STATE_LOW = 1 << 31
"""The encoder's start state, and the lower end of the normalised interval."""
MAX_SYMBOL = (1 << 30) - 1
"""Largest symbol; the smallest is -2^30. Symbols in this range always fit 8 bypass digits."""
OFFSET_MAX = 1 << 28
"""Limit on a CDF's first symbol, so that a symbol's distance from it fits 8 bypass digits."""

_OK, _SHORT, _BYPASS, _CONTEXT = range(4)

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tables:
    """The CDFs of all contexts, as CompressAI's `update()` computes them.

    A row of `cdf` (contexts, width) holds cumulative frequencies; its last symbol is the escape to
    bypass digits. `length` (contexts,) is the number of entries used in each row, `offset`
    (contexts,) the value of its first symbol. Raises `ValueError` if a row is not a CDF or an
    offset is beyond `OFFSET_MAX`.
    """

    cdf: Int32Array
    length: Int32Array
    offset: Int32Array

    def __post_init__(self) -> None:
        n, width = self.cdf.shape
        if self.length.shape != (n,) or self.offset.shape != (n,):
            raise ValueError(
                f"cdf has {n} rows, but length has the shape {self.length.shape} and offset "
                f"{self.offset.shape}; both must be ({n},)"
            )
        if n == 0 or self.length.min() < 3 or self.length.max() > width:
            raise ValueError(f"the length of each CDF must be 3 to {width}, the width of the table")
        if self.offset.min() < -OFFSET_MAX or self.offset.max() > OFFSET_MAX:
            raise ValueError(f"an offset is out of range; choose -{OFFSET_MAX} to {OFFSET_MAX}")
        for row, size in zip(self.cdf, self.length, strict=True):
            rises = (row[1:size] > row[: size - 1]).all()  # `np.diff` could overflow
            if row[0] != 0 or row[size - 1] != 1 << PRECISION or not rises:
                raise ValueError("each CDF must rise strictly from 0 to 65536; one does not")


@compiled()
def _refill(x, words, position):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Renormalise the state by reading a word; if none is left, read 0 and advance `position`."""
    if x >= np.uint64(1 << 31):
        return x, position
    word = words[position] if position < words.size else np.uint32(0)
    return (x << np.uint64(32)) | np.uint64(word), position + 1


@compiled()
def _raw(value, escape):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return the number to write as bypass digits, or -1 if the CDF has an entry for the value."""
    if 0 <= value < escape:
        return np.int64(-1)
    return -2 * value - 1 if value < 0 else 2 * (value - escape)


@compiled()
def _bypass(x, words, position):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Read the number of bypass digits and the digits, lowest first.

    Returns state, position and the value; -1 for digits that no encoder writes. CompressAI's format
    has counts of 15 and more, but no symbol needs more than 8 digits.
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
    if count > 0 and digit == 0:  # no encoder writes a leading zero
        raw = np.int64(-1)
    return x, position, raw


@compiled()
def _decode(words, state, indexes, cdf, length, offset, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Decode one symbol per index; `state` (2,) holds the rANS state and the next word's number."""
    x, position = state[0], np.int64(state[1])
    for i in range(indexes.size):
        row = indexes[i]
        if row < 0 or row >= cdf.shape[0]:
            return _CONTEXT
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
        if value > MAX_SYMBOL or value < -MAX_SYMBOL - 1:
            return _BYPASS
        out[i] = value
    state[0], state[1] = x, np.uint64(position)
    return _OK


@compiled()
def _encode(symbols, indexes, cdf, length, offset, words):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fill `words` from its end towards its beginning; return the first position in use."""
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
            digits[0] = n  # at most 8, so one digit holds it
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


@compiled()
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


def parse_words(data: bytes) -> NDArray[np.uint32]:
    """Return entropy-coded `data` as 32-bit words; the first two are the encoder's end state.

    Raises `CorruptStream` if `data` is invalid whatever the tables and contexts are.
    """
    if len(data) % 4 or len(data) < 8:
        raise CorruptStream(
            f"an entropy-coded string has {len(data)} bytes; its length must be a multiple of 4, "
            "and at least 8"
        )
    if not STATE_LOW <= int.from_bytes(data[:8], "little") < 1 << 63:
        raise CorruptStream("the entropy-coded bytes do not begin with a valid state: damaged data")
    return np.frombuffer(data, "<u4")


class Decoder:
    """A decoder that reads some symbols at a time, for contexts that depend on those before."""

    def __init__(self, data: bytes, tables: Tables) -> None:
        """Start at the first symbol. Raises `CorruptStream` as `parse_words` does."""
        self._words, self._tables = parse_words(data), tables
        first = int(self._words[0]) | int(self._words[1]) << 32
        self._state = np.array([first, 2], np.uint64)

    def read(self, indexes: Int32Array, out: Int32Array) -> None:
        """Decode the next symbols into `out` (n,); `indexes` (n,) holds the context of each.

        Raises `CorruptStream` if the bytes end early or contain an invalid escape code,
        `ValueError` if a context has no table.
        """
        t = self._tables
        status = _decode(self._words, self._state, indexes, t.cdf, t.length, t.offset, out)
        if status == _SHORT:
            raise CorruptStream("the entropy-coded bytes end before the last symbol: damaged data")
        if status == _BYPASS:
            raise CorruptStream("an escape code holds a value that no encoder writes: damaged data")
        if status == _CONTEXT:
            _contexts(indexes, t)

    def close(self) -> None:
        """Check the end state after the last symbol.

        Raises `DesynchronisedStream` if it is not the encoder's start state, or words remain.
        """
        x, position = self._state.tolist()
        if x != STATE_LOW:
            raise DesynchronisedStream(
                "the entropy decoder did not end in the encoder's start state: damaged data, or "
                "other weights than the encoder's"
            )
        if position != self._words.size:
            raise DesynchronisedStream(
                "entropy-coded bytes remain after the last symbol: damaged data, or other weights "
                "than the encoder's"
            )


def decode(data: bytes, indexes: Int32Array, tables: Tables) -> Int32Array:
    """Decode `data` to int32 symbols of the shape of `indexes`, the context of each symbol.

    Raises `CorruptStream` if the bytes end early, are not whole words or contain an invalid escape
    code, `DesynchronisedStream` if the decoder does not end in the encoder's start state.
    """
    decoder = Decoder(data, tables)
    out = np.empty(indexes.size, np.int32)
    decoder.read(_contexts(indexes, tables), out)
    decoder.close()
    return out.reshape(indexes.shape)


def encode(symbols: Int32Array, indexes: Int32Array, tables: Tables) -> bytes:
    """Encode int32 `symbols`, each in the context at its position in `indexes`, to bytes.

    Raises `ValueError` if shapes differ, a symbol is beyond `MAX_SYMBOL` or a context has no table.
    """
    flat, contexts = _flat(symbols, indexes), _contexts(indexes, tables)
    words = np.empty(flat.size * 2 + 4, np.uint32)  # at most 16 + 9·4 bits a symbol
    at = _encode(flat, contexts, tables.cdf, tables.length, tables.offset, words)
    return words[at:].astype("<u4", copy=False).tobytes()


def bits(symbols: Int32Array, indexes: Int32Array, tables: Tables) -> NDArray[np.float32]:
    """Return the number of bits per symbol, float32 of the shape of `symbols`.

    Raises `ValueError` as `encode` does.
    """
    flat, contexts = _flat(symbols, indexes), _contexts(indexes, tables)
    out = np.empty(flat.size, np.float32)
    _bits(flat, contexts, tables.cdf, tables.length, tables.offset, out)
    return out.reshape(symbols.shape)


def _contexts(indexes: Int32Array, tables: Tables) -> Int32Array:
    if indexes.size and not 0 <= indexes.min() <= indexes.max() < len(tables.cdf):
        raise ValueError(
            f"contexts are {indexes.min()} to {indexes.max()}; the tables have 0 to "
            f"{len(tables.cdf) - 1}"
        )
    return np.ascontiguousarray(indexes, np.int32).reshape(-1)


def _flat(symbols: Int32Array, indexes: Int32Array) -> Int32Array:
    if symbols.shape != indexes.shape:
        raise ValueError(
            f"symbols have the shape {symbols.shape}, contexts {indexes.shape}; both must agree"
        )
    if symbols.size and not -MAX_SYMBOL - 1 <= symbols.min() <= symbols.max() <= MAX_SYMBOL:
        raise ValueError(
            f"symbols are {symbols.min()} to {symbols.max()}; they must fit 31 bits, sign included"
        )
    return np.ascontiguousarray(symbols, np.int32).reshape(-1)
