"""The entropy coder against CompressAI's, both ways, and against bytes that no encoder wrote."""

import numpy as np
import pytest
from compressai import ans
from hypothesis import given, settings
from hypothesis import strategies as st

from models import rans
from models.errors import BitstreamError, CorruptStream, DesynchronisedStream


def tables(rng: np.random.Generator, contexts: int) -> rans.Tables:
    width = 12
    cdf = np.zeros((contexts, width), np.int32)
    length = rng.integers(3, width + 1, contexts, dtype=np.int32)
    for row, size in zip(cdf, length, strict=True):
        row[1 : size - 1] = np.sort(rng.choice(np.arange(1, 65536), size - 2, replace=False))
        row[size - 1] = 65536
    return rans.Tables(cdf, length, rng.integers(-9, 4, contexts, dtype=np.int32))


def case(seed: int, n: int, spread: int) -> tuple[rans.Int32Array, rans.Int32Array, rans.Tables]:
    rng = np.random.default_rng(seed)
    t = tables(rng, 5)
    symbols = np.rint(rng.laplace(0, spread, n)).astype(np.int32)
    return symbols, rng.integers(0, 5, n, dtype=np.int32), t


def as_lists(t: rans.Tables) -> tuple[list[list[int]], list[int], list[int]]:
    rows = [row[:size].tolist() for row, size in zip(t.cdf, t.length, strict=True)]
    return rows, t.length.tolist(), t.offset.tolist()


cases = given(
    st.integers(0, 2**32 - 1),
    st.integers(8, 300),  # below, CompressAI's encoder writes past its own buffer
    st.sampled_from([1, 6, 400, 10**6]),
)


@settings(max_examples=60, deadline=None)
@cases
def test_compressai_reads_what_we_write_and_writes_the_same_bytes(
    seed: int, n: int, spread: int
) -> None:
    symbols, indexes, t = case(seed, n, spread)
    ours = rans.encode(symbols, indexes, t)
    theirs = ans.RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *as_lists(t))
    assert ours == theirs
    # its decoder reads past the end of what it needs, so it is given room
    read = ans.RansDecoder().decode_with_indexes(ours + bytes(64), indexes.tolist(), *as_lists(t))
    assert read == symbols.tolist()


@settings(max_examples=60, deadline=None)
@cases
def test_decoding_reverses_encoding(seed: int, n: int, spread: int) -> None:
    symbols, indexes, t = case(seed, n, spread)
    assert np.array_equal(rans.decode(rans.encode(symbols, indexes, t), indexes, t), symbols)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_decode_to_symbols(data: bytes) -> None:
    _, indexes, t = case(1, 200, 6)
    with pytest.raises(BitstreamError):
        rans.decode(data, indexes, t)


def test_every_flipped_bit_is_noticed_where_no_symbol_escapes() -> None:
    """A flipped bypass digit is another value of the same length: only a checksum can see it."""
    symbols, indexes, t = case(2, 150, 6)
    first = t.offset[indexes]
    symbols = np.clip(symbols, first, first + t.length[indexes] - 3)
    good = rans.encode(symbols, indexes, t)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            rans.decode(bytes(bad), indexes, t)


def test_every_truncation_is_noticed() -> None:
    symbols, indexes, t = case(3, 150, 6)
    good = rans.encode(symbols, indexes, t)
    for end in range(len(good)):
        with pytest.raises(CorruptStream):
            rans.decode(good[:end], indexes, t)


def test_a_wrong_context_is_noticed() -> None:
    symbols, indexes, t = case(4, 150, 6)
    good = rans.encode(symbols, indexes, t)
    wrong = indexes.copy()
    wrong[70] = (wrong[70] + 1) % 5
    with pytest.raises((DesynchronisedStream, CorruptStream)):
        rans.decode(good, wrong, t)


def test_trailing_words_are_noticed() -> None:
    symbols, indexes, t = case(5, 20, 6)
    with pytest.raises(DesynchronisedStream, match="remain"):
        rans.decode(rans.encode(symbols, indexes, t) + bytes(4), indexes, t)


def test_contexts_outside_the_tables_are_refused() -> None:
    symbols, indexes, t = case(6, 20, 6)
    data = rans.encode(symbols, indexes, t)
    for wrong in (5, -1):
        with pytest.raises(ValueError, match="contexts"):
            rans.decode(data, np.full_like(indexes, wrong), t)


def test_bits_add_up_to_the_size_of_the_stream() -> None:
    symbols, indexes, t = case(7, 20_000, 6)
    bits = rans.bits(symbols, indexes, t).sum(dtype=float)
    assert abs(8 * len(rans.encode(symbols, indexes, t)) - bits) < 100


@pytest.mark.parametrize("last", [65535, 65537])
def test_tables_that_are_no_cdf_are_refused(last: int) -> None:
    cdf = np.array([[0, 10, last]], np.int32)
    with pytest.raises(ValueError, match="CDF"):
        rans.Tables(cdf, np.array([3], np.int32), np.array([0], np.int32))
