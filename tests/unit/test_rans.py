"""The entropy coder compared with CompressAI's, and given bytes that no encoder wrote."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.codec import rans
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
    st.integers(8, 300),  # with fewer, CompressAI's encoder writes past its buffer
    st.sampled_from([1, 6, 400, 10**6]),
)


@pytest.mark.compressai
@settings(max_examples=60, deadline=None)
@cases
def test_compressai_decodes_our_bytes_and_encodes_the_same_bytes(
    seed: int, n: int, spread: int
) -> None:
    symbols, indexes, t = case(seed, n, spread)
    from compressai import ans

    ours = rans.encode(symbols, indexes, t)
    theirs = ans.RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *as_lists(t))
    assert ours == theirs
    # the padding is for CompressAI's decoder, which reads past the end of the data
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


def test_every_flipped_bit_is_detected_if_no_two_symbols_have_the_same_frequency() -> None:
    """Only a checksum can detect a flipped bypass digit, so the symbols have none here.

    The same is true for a bit that turns a symbol into another of the same frequency.
    """
    symbols, indexes, t = case(2, 150, 6)
    first = t.offset[indexes]
    symbols = np.clip(symbols, first, first + t.length[indexes] - 3)
    good = rans.encode(symbols, indexes, t)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            rans.decode(bytes(bad), indexes, t)


def test_a_flipped_bit_can_turn_a_symbol_into_another_of_the_same_frequency() -> None:
    """Such a flip needs a checksum: `.msh` has one, CompressAI's format does not."""
    t = rans.Tables(
        np.array([[0, 1, 2, 65536]], np.int32), np.array([4], np.int32), np.zeros(1, np.int32)
    )
    one, twin = (rans.encode(np.array([v], np.int32), np.zeros(1, np.int32), t) for v in (0, 1))
    assert np.unpackbits(np.frombuffer(one, np.uint8) ^ np.frombuffer(twin, np.uint8)).sum() == 1


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.data())
def test_accepted_bytes_encode_to_the_same_bytes_again(seed: int, data: st.DataObject) -> None:
    """Each sequence of symbols has exactly one encoding."""
    symbols, indexes, t = case(seed, 30, data.draw(st.sampled_from([1, 6, 400])))
    good = bytearray(rans.encode(symbols, indexes, t))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    try:
        decoded = rans.decode(bytes(good), indexes, t)
    except BitstreamError:
        return
    assert rans.encode(decoded, indexes, t) == good


def bare(value: int, *digits: int) -> tuple[bytes, rans.Int32Array, rans.Tables]:
    """The encoding of one symbol, `value`, followed by these bypass digits without any check."""
    t = rans.Tables(
        np.array([[0, 1 << 15, 1 << 16]], np.int32), np.array([3], np.int32), np.zeros(1, np.int32)
    )
    x = 1 << 31
    for digit in reversed(digits):
        x = x << 4 | digit
    x = (x >> 15 << 16) + (x & 0x7FFF) + (value << 15)
    return x.to_bytes(8, "little"), np.zeros(1, np.int32), t


def test_bypass_digits_have_the_layout_of_compressai() -> None:
    data, indexes, t = bare(1, 1, 5)
    assert rans.decode(data, indexes, t).tolist() == [-3]
    assert rans.encode(np.array([-3], np.int32), indexes, t) == data


@pytest.mark.parametrize(
    "digits", [(2, 5, 0), (1, 0), (9, *[1] * 3), (15, 1), (15, 15), (15, 15, 15)], ids=str
)
def test_bypass_digits_that_no_encoder_writes_are_refused(digits: tuple[int, ...]) -> None:
    """Leading zeros, and more digits than a symbol has."""
    with pytest.raises(CorruptStream):
        rans.decode(*bare(1, *digits))


@pytest.mark.parametrize("state", [0, (1 << 31) - 1, 1 << 63, (1 << 64) - 1])
def test_states_that_no_encoder_reaches_are_refused(state: int) -> None:
    _, indexes, t = bare(0)
    with pytest.raises(CorruptStream, match="begin"):
        rans.decode(state.to_bytes(8, "little"), indexes, t)


@pytest.mark.parametrize("value", [-(1 << 30), (1 << 30) - 1])
def test_the_largest_symbols_round_trip(value: int) -> None:
    _, indexes, t = bare(0)
    one = np.array([value], np.int32)
    assert rans.decode(rans.encode(one, indexes, t), indexes, t) == value
    with pytest.raises(ValueError, match="31 bits"):
        rans.encode(one + (1 if value > 0 else -1), indexes, t)


def test_values_beyond_int32_are_refused_instead_of_wrapping_around() -> None:
    symbols, indexes, t = case(8, 20, 6)
    data = rans.encode(symbols, indexes, t)
    with pytest.raises(ValueError, match="contexts"):
        rans.decode(data, indexes.astype(np.int64) + (1 << 32), t)
    with pytest.raises(ValueError, match="31 bits"):
        rans.encode(symbols.astype(np.int64) + (1 << 32), indexes, t)


@pytest.mark.parametrize("n", range(1, 8))
def test_lengths_that_are_no_multiple_of_4_are_refused(n: int) -> None:
    symbols, indexes, t = case(9, 20, 6)
    data = rans.encode(symbols, indexes, t)
    for bad in (data + bytes(n), data[:-n], data[:n]):
        with pytest.raises(BitstreamError):
            rans.decode(bad, indexes, t)


def test_decoding_allocates_memory_for_the_symbols_only() -> None:
    _, indexes, t = case(10, 1000, 6)
    start = (1 << 31).to_bytes(8, "little")  # a valid state
    data = start + np.random.default_rng(0).bytes(4_000_000)
    with pytest.raises(BitstreamError):
        rans.decode(data, indexes, t)  # compiles the decoder
    tracemalloc.start()
    with pytest.raises(BitstreamError):
        rans.decode(data, indexes, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_symbols_of_any_shape_are_coded_in_memory_order() -> None:
    symbols, indexes, t = case(11, 24, 6)
    shape = (2, 3, 4)
    data = rans.encode(symbols.reshape(shape), indexes.reshape(shape), t)
    assert data == rans.encode(symbols, indexes, t)
    assert np.array_equal(rans.decode(data, indexes.reshape(shape), t), symbols.reshape(shape))


def test_every_truncation_is_detected() -> None:
    symbols, indexes, t = case(3, 150, 6)
    good = rans.encode(symbols, indexes, t)
    for end in range(len(good)):
        with pytest.raises(CorruptStream):
            rans.decode(good[:end], indexes, t)


def test_a_wrong_context_is_detected() -> None:
    symbols, indexes, t = case(4, 150, 6)
    good = rans.encode(symbols, indexes, t)
    wrong = indexes.copy()
    wrong[70] = (wrong[70] + 1) % 5
    with pytest.raises((DesynchronisedStream, CorruptStream)):
        rans.decode(good, wrong, t)


def test_trailing_words_are_detected() -> None:
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


@pytest.mark.parametrize(
    "row",
    [(0, 10, 65535), (0, 10, 65537), (1, 10, 65536), (0, 10, 10, 65536), (0, 65536),
     (0, 2**31 - 1, -(2**31), -1, 65536)],
    ids=str,
)  # fmt: skip
def test_tables_that_are_not_cdfs_are_refused(row: tuple[int, ...]) -> None:
    """In the last row, differences overflow int32."""
    with pytest.raises(ValueError, match="CDF"):
        rans.Tables(
            np.array([row], np.int32), np.array([len(row)], np.int32), np.zeros(1, np.int32)
        )


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_symbols_round_trip_with_the_largest_offset(sign: int) -> None:
    cdf, length = np.array([[0, 1 << 15, 1 << 16]], np.int32), np.array([3], np.int32)
    t = rans.Tables(cdf, length, np.array([sign * rans.OFFSET_MAX], np.int32))
    symbols, indexes = (
        np.array([rans.MAX_SYMBOL, -rans.MAX_SYMBOL - 1], np.int32),
        np.zeros(2, np.int32),
    )
    assert np.array_equal(rans.decode(rans.encode(symbols, indexes, t), indexes, t), symbols)
    with pytest.raises(ValueError, match="out of range"):
        rans.Tables(cdf, length, np.array([sign * (rans.OFFSET_MAX + 1)], np.int32))
