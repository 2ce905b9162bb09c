"""Parsing and serialising both container formats, and the errors for invalid files."""

import io
import random
import struct
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models import geometry
from models.codec import bitstream
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec
from models.errors import (
    BitstreamError,
    ChecksumMismatch,
    CorruptStream,
    DesynchronisedStream,
    LengthMismatch,
    MalformedHeader,
    PictureTooLarge,
    UnsupportedCodec,
)
from service.schemas import Inspection


def compressai_header(model: int = 3, code: int = 1, h: int = 100, w: int = 150, depth: int = 8,
                      z: tuple[int, int] = (2, 3), strings: int = 2) -> bytes:  # fmt: skip
    return struct.pack(">BBIIBIII", model, code, h, w, depth, *z, strings)


def in_layout(data: bytes, versions: str) -> bytes:
    """A file of today's CompressAI, as older versions wrote it."""
    end = 11 if versions == "1.2.0 to 1.2.1" else 10
    return bytes([2]) + data[1:end] + data[11:]


OLD_LAYOUTS = ("1.2.0 to 1.2.1", "1.0.3 to 1.1.9")


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


@pytest.mark.parametrize(
    ("data", "models"),
    [
        (
            compressai_header(model=10),
            r"'hrtzxf2022-pcc-rec' \(1.2.2 and later\); supported are bmshj2018-factorized, ",
        ),
        (compressai_header(model=9), r"'mbt2018-vbr' \(1.2.2 and later\)"),
        (b"\6" + in_layout(compressai_header(), "1.0.3 to 1.1.9")[1:], r"'ssf2020' \(1.0.3 to "),
    ],
)
def test_the_error_names_the_compressai_models_that_are_not_supported(
    data: bytes, models: str
) -> None:
    with pytest.raises(UnsupportedCodec, match=models):
        bitstream.parse(data)


@pytest.mark.parametrize("versions", OLD_LAYOUTS)
def test_files_of_older_versions_of_compressai_are_parsed(
    small_compressai: bytes, versions: str
) -> None:
    old, today = in_layout(small_compressai, versions), bitstream.parse(small_compressai)
    b = bitstream.parse(old)
    assert b == replace(today, versions=versions)
    assert Inspection.of(b, len(old), True).layout == f"image file of CompressAI {versions}"
    assert bitstream.serialize(b) == old


@pytest.mark.parametrize("versions", OLD_LAYOUTS)
def test_files_of_older_versions_of_compressai_are_decoded(
    shipped: Codec, small_compressai: bytes, versions: str
) -> None:
    b = bitstream.parse(in_layout(small_compressai, versions))
    theirs = shipped.latents(bitstream.parse(small_compressai)).symbols
    assert np.array_equal(shipped.latents(b).symbols, theirs)


@pytest.mark.parametrize(
    ("versions", "models"),
    [
        ("1.2.2 and later", ["'mbt2018-mean' (CompressAI 1.2.2", "'mbt2018' (CompressAI 1.2.0"]),
        ("1.2.0 to 1.2.1", ["'mbt2018-mean' (CompressAI 1.2.0", "'bmshj2018-hyperprior' (Comp"]),
        ("1.0.3 to 1.1.9", []),
    ],
)
def test_a_stream_that_fits_no_model_of_its_id_names_all_of_them(
    shipped: Codec, small_compressai: bytes, versions: str, models: list[str]
) -> None:
    old = versions in OLD_LAYOUTS
    b = bitstream.parse(in_layout(small_compressai, versions) if old else small_compressai)
    b = replace(b, z_string=b.z_string[:-4])
    with pytest.raises((CorruptStream, DesynchronisedStream)) as e:
        shipped.latents(b)
    assert all(name in str(e.value) for name in models)
    assert ("CompressAI" in str(e.value)) == bool(models)


@pytest.mark.parametrize("model", [2, 3])
def test_a_header_that_fits_no_model_of_its_id_names_all_of_them(model: int) -> None:
    for changes in ({"z": (3, 2)}, {"strings": 1}):
        header = compressai_header(model=model, **changes)
        with pytest.raises(LengthMismatch, match="read as 'mbt2018-mean' .* may be of '.*'"):
            bitstream.parse(header)


def test_a_layout_of_unknown_versions_is_not_written(small_compressai: bytes) -> None:
    b = bitstream.parse(small_compressai)
    with pytest.raises(ValueError, match=r"'0.9'; choose one of 1.2.2 and later, 1.2.0"):
        bitstream.serialize(replace(b, versions="0.9"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WebP", "GIF", "AVIF", "TIFF", "BMP"])
def test_a_picture_is_refused_with_the_command_that_encodes_it(format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format)
    with pytest.raises(UnsupportedCodec, match=f"{format} picture.*afterimage encode.*/v1/encodes"):
        bitstream.parse(file.getvalue())


@pytest.mark.parametrize(
    "head",
    [b"MM\0*", b"MM\0+", b"GIF87a", b"\0\0\0\x20ftypmif1\0\0\0\0mif1avif", b"\xff\xd8\xff\xe1"],
)
def test_pictures_are_recognised_in_all_their_variants(head: bytes) -> None:
    with pytest.raises(UnsupportedCodec, match="picture, not a bitstream"):
        bitstream.parse(head + bytes(40))


@pytest.mark.parametrize(("head", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"PK\3\4", "ZIP")])
def test_the_error_for_a_file_of_another_known_format_names_it(head: bytes, name: str) -> None:
    with pytest.raises(UnsupportedCodec, match=f"its format is {name}"):
        bitstream.parse(head + bytes(40))


def test_other_file_formats_are_unsupported() -> None:
    with pytest.raises(UnsupportedCodec, match="begins with c8c8c8c8"):
        bitstream.parse(bytes([200]) * 50)


@pytest.mark.parametrize("versions", ["1.2.2 and later", *OLD_LAYOUTS])
def test_the_error_for_a_cut_file_begins_with_truncated(
    small_msh: bytes, small_compressai: bytes, versions: str
) -> None:
    b = replace(bitstream.parse(small_compressai), versions=versions)
    data = bitstream.serialize(b)
    ends = [*range(11, 60), len(data) - len(b.z_string) - 4, len(data) - 1]
    files = [data[:end] for end in ends] + [small_msh[:end] for end in (4, 35, 36, 99)]
    for cut in files:
        with pytest.raises((MalformedHeader, LengthMismatch), match="^truncated"):
            bitstream.parse(cut)


def test_the_error_for_too_many_pixels_names_the_variable_of_the_limit(small_msh: bytes) -> None:
    with pytest.raises(PictureTooLarge, match="AFTERIMAGE_MAX_PIXELS"):
        bitstream.parse(small_msh, max_pixels=100)


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


HEADERS = st.builds(
    lambda model, code, h, w, depth, z, strings, rest: (
        compressai_header(model, code, h, w, depth, z, strings) + rest
    ),
    *[st.integers(0, 255)] * 2, *[st.integers(0, 2**32 - 1)] * 2,
    st.integers(0, 255), st.tuples(*[st.integers(0, 2**32 - 1)] * 2), st.integers(0, 2**32 - 1),
    st.binary(max_size=40),
)  # fmt: skip
OLD_HEADERS = st.builds(in_layout, HEADERS, st.sampled_from(OLD_LAYOUTS))


def _msh(version: int, profile: int, quality: int, metric: int, height: int, width: int,
         weights: bytes, y_length: int, symbols: int, payload: bytes) -> bytes:  # fmt: skip
    """An .msh file with any header fields and a valid checksum."""
    head = b"\x8dMSH" + struct.pack(
        "<BBBBII8sII", version, profile, quality, metric, height, width, weights, y_length, symbols
    )
    return head + struct.pack("<I", google_crc32c.value(head + payload)) + payload


MSH_HEADERS = st.builds(
    _msh, *[st.integers(0, 4)] * 4, *[st.integers(0, 5000)] * 2,
    st.binary(min_size=8, max_size=8), st.integers(0, 60), st.integers(0, 2**32 - 1),
    st.binary(max_size=60),
)  # fmt: skip


@given(st.one_of(st.binary(max_size=80), HEADERS, OLD_HEADERS, MSH_HEADERS))
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
        *(Bitstream("compressai", "float", *size, versions=v) for v in OLD_LAYOUTS),
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
