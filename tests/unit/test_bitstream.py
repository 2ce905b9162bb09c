"""Parsing and serialising both container formats, and the errors for invalid files."""

import random
import struct
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import geometry
from models.codec import bitstream
from models.codec.bitstream import Bitstream
from models.errors import (
    BitstreamError,
    ChecksumMismatch,
    LengthMismatch,
    MalformedHeader,
    PictureTooLarge,
    UnsupportedCodec,
)


def compressai_header(model: int = 3, code: int = 1, h: int = 100, w: int = 150, depth: int = 8,
                      z: tuple[int, int] = (2, 3), strings: int = 2) -> bytes:  # fmt: skip
    return struct.pack(">BBIIBIII", model, code, h, w, depth, *z, strings)


def test_both_formats_round_trip(small_msh: bytes, small_compressai: bytes) -> None:
    for data in (small_msh, small_compressai):
        assert bitstream.serialize(bitstream.parse(data)) == data


def test_msh_adds_at_most_40_bytes_to_its_strings(small_msh: bytes) -> None:
    b = bitstream.parse(small_msh)
    assert len(small_msh) - len(b.y_string) - len(b.z_string) <= 40


@pytest.mark.parametrize("end", [1, 3, 4, 20, 35])
def test_a_file_shorter_than_the_msh_header_is_malformed(small_msh: bytes, end: int) -> None:
    with pytest.raises(MalformedHeader):
        bitstream.parse(small_msh[:end])


def test_an_empty_file_is_malformed() -> None:
    with pytest.raises(MalformedHeader, match="empty"):
        bitstream.parse(b"")


@pytest.mark.parametrize("end", [1, 10, 22])
def test_a_file_shorter_than_the_compressai_header_is_malformed(
    small_compressai: bytes, end: int
) -> None:
    with pytest.raises(MalformedHeader):
        bitstream.parse(small_compressai[:end])


def test_the_error_names_the_compressai_model_that_is_not_supported() -> None:
    with pytest.raises(UnsupportedCodec, match="cheng2020-anchor"):
        bitstream.parse(compressai_header(model=5))


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(40), bytes([200]) * 50])
def test_other_file_formats_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedCodec):
        bitstream.parse(data)


@pytest.mark.parametrize("fields", [{"code": 0x2F}, {"code": 0x09}, {"depth": 10}])
def test_unknown_metrics_qualities_and_bit_depths_of_compressai_are_unsupported(
    fields: dict[str, Any],
) -> None:
    with pytest.raises(UnsupportedCodec):
        bitstream.parse(compressai_header(**fields))


def test_a_header_that_declares_a_huge_picture_is_refused() -> None:
    """Before anything is allocated for it: the file ends after the header."""
    with pytest.raises(PictureTooLarge, match="65535×65535"):
        bitstream.parse(compressai_header(h=65535, w=65535, z=(1024, 1024)) + bytes(64))


def test_a_very_thin_picture_is_refused_because_of_its_padding() -> None:
    with pytest.raises(PictureTooLarge, match="side"):
        bitstream.parse(compressai_header(h=1, w=200_000, z=(1, 3125)) + bytes(64))


@pytest.mark.parametrize(
    "data",
    [
        compressai_header(z=(3, 2)),
        compressai_header(h=0),
        compressai_header(strings=1),
        compressai_header(),
        compressai_header() + struct.pack(">I", 9) + bytes(8),
        compressai_header() + struct.pack(">I", 2**32 - 1) + bytes(8),
        compressai_header() + struct.pack(">I", 8) + bytes(8) + struct.pack(">I", 8) + bytes(9),
    ],
    ids=["z shape", "no rows", "one string", "no strings", "short", "4 GiB", "trailing"],
)
def test_contradicting_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(LengthMismatch):
        bitstream.parse(data)


def _msh(version: int, profile: int, quality: int, metric: int, height: int, width: int,
         weights: bytes, y_length: int, symbols: int, payload: bytes) -> bytes:  # fmt: skip
    """An .msh file with any header fields and a valid checksum."""
    head = b"\x8dMSH" + struct.pack(
        "<BBBBII8sII", version, profile, quality, metric, height, width, weights, y_length, symbols
    )
    return head + struct.pack("<I", google_crc32c.value(head + payload)) + payload


HEADERS = st.builds(
    lambda model, code, h, w, depth, z, strings, rest: (
        compressai_header(model, code, h, w, depth, z, strings) + rest
    ),
    *[st.integers(0, 255)] * 2, *[st.integers(0, 2**32 - 1)] * 2,
    st.integers(0, 255), st.tuples(*[st.integers(0, 2**32 - 1)] * 2), st.integers(0, 2**32 - 1),
    st.binary(max_size=40),
)  # fmt: skip
MSH_HEADERS = st.builds(
    _msh, *[st.integers(0, 4)] * 4, *[st.integers(0, 5000)] * 2,
    st.binary(min_size=8, max_size=8), st.integers(0, 60), st.integers(0, 2**32 - 1),
    st.binary(max_size=60),
)  # fmt: skip


@given(st.one_of(st.binary(max_size=80), HEADERS, MSH_HEADERS))
def test_any_bytes_either_round_trip_or_raise_an_error_with_a_message(data: bytes) -> None:
    try:
        b = bitstream.parse(data)
    except (BitstreamError, PictureTooLarge) as e:
        assert len(str(e)) > 10
    else:
        assert bitstream.serialize(b) == data
        assert 0 < b.height * b.width <= geometry.MAX_PIXELS


@given(st.integers(1, 8), st.sampled_from(bitstream.METRICS), st.integers(1, 4096),
       st.integers(1, 4096), st.binary(max_size=99), st.binary(max_size=99),
       st.binary(min_size=8, max_size=8), st.integers(0, 2**32 - 1))  # fmt: skip
def test_every_header_is_parsed_as_it_was_serialised(
    quality: int, metric: bitstream.Metric, height: int, width: int, y: bytes, z: bytes,
    weights: bytes, symbols: int,
) -> None:  # fmt: skip
    size = quality, metric, height, width, y, z
    for b in (
        Bitstream("msh", "exact", *size, weights.hex(), symbols),
        Bitstream("compressai", "float", *size),
    ):
        assert bitstream.parse(bitstream.serialize(b)) == b


def test_an_msh_file_with_any_byte_changed_is_refused(small_msh: bytes) -> None:
    rng = random.Random(0)
    for at in [*range(40), *rng.sample(range(40, len(small_msh)), 100)]:
        bad = bytearray(small_msh)
        bad[at] ^= rng.randrange(1, 256)
        with pytest.raises((BitstreamError, PictureTooLarge)):
            bitstream.parse(bytes(bad))


def test_a_changed_payload_raises_a_checksum_error(small_msh: bytes) -> None:
    bad = bytearray(small_msh)
    bad[-1] ^= 1
    with pytest.raises(ChecksumMismatch):
        bitstream.parse(bytes(bad))


def test_the_error_names_an_unknown_version(small_msh: bytes) -> None:
    bad = bytearray(small_msh)
    bad[4] = 9
    with pytest.raises(UnsupportedCodec, match="version 9"):
        bitstream.parse(bytes(bad))


def test_the_checksum_is_crc32c_of_all_other_bytes(small_msh: bytes) -> None:
    (crc,) = struct.unpack_from("<I", small_msh, 32)
    assert crc == google_crc32c.value(small_msh[:32] + small_msh[36:])
