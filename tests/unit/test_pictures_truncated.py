"""Truncated picture files are read as far as they go, or refused with the reason."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import image
from models.errors import PictureError
from models.pictures import boxes
from models.pictures.decode import MISSING
from tests.support.pictures import rgb_tags, tiff


def file(picture: image.Pixels, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("lossless", [False, True])
def test_the_upper_rows_of_a_truncated_webp_file_are_read(
    photo: image.Pixels, lossless: bool
) -> None:
    whole = file(photo, "WEBP", lossless=lossless)
    expected = image.read(whole, 10**6)
    found = image.read_with_notes(whole[: len(whole) * 3 // 5], 10**6)
    assert found.notes == (MISSING,)
    missing = (found.pixels == 0).all((1, 2))
    first = int(missing.argmax())
    assert missing[first:].all()
    assert 0.2 < first / len(photo) < 0.8
    assert (found.pixels[: first - 16] == expected[: first - 16]).all()


def test_a_truncated_animated_webp_file_is_read_if_its_first_frame_is_whole(
    small: image.Pixels,
) -> None:
    more = [Image.fromarray(small[::-1].copy())]
    whole = file(small, "WEBP", save_all=True, append_images=more, lossless=True)
    for end in (-2, -len(whole) // 3):
        found = image.read_with_notes(whole[:end], 10**6)
        assert (found.notes, (found.pixels == small).all()) == ((), True)


def test_a_webp_file_whose_header_has_a_wrong_size_is_read(small: image.Pixels) -> None:
    data = file(small, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(100))
    for wrong in (data[:-4], data + b"more", data[:4] + bytes(4) + data[8:]):
        assert (image.read(wrong, 10**6) == small).all()


@pytest.mark.parametrize("end", [20, 40])
def test_a_webp_file_without_pixels_is_refused_as_truncated(small: image.Pixels, end: int) -> None:
    with pytest.raises(PictureError, match="truncated: (it has no|its) pixels"):
        image.read_with_notes(file(small, "WEBP")[:end], 10**6)


def test_a_webp_header_that_claims_gigabytes_allocates_nothing() -> None:
    data = struct.pack("<4sI4s4sI", b"RIFF", 2**32 - 2, b"WEBP", b"VP8 ", 2**32 - 20) + bytes(50)
    with pytest.raises(PictureError, match="lacks 42949"):
        image.read_with_notes(data, 10**6)


def test_the_strips_that_a_truncated_tiff_file_has_are_read(small: image.Pixels) -> None:
    height, width = small.shape[:2]
    raw = tiff(rgb_tags(width, height), small.tobytes())
    found = image.read_with_notes(raw[: -small.nbytes // 2], 10**6)
    assert found.notes == (MISSING,)
    assert (found.pixels[: height // 2] == small[: height // 2]).all()
    assert not found.pixels[height // 2 + 1 :].any()


def test_a_compressed_tiff_file_is_read_up_to_its_last_whole_strip(photo: image.Pixels) -> None:
    data = bytearray(file(photo, "TIFF", compression="tiff_lzw"))
    (directory,) = struct.unpack_from("<I", data, 4)
    begin = bytes(8) + data[directory:]  # the directory first, as interrupted writers leave it
    moved = bytearray(b"II*\0" + struct.pack("<I", 8) + begin[8:])
    shift, end = len(moved) - 8, directory
    _move_offsets(moved, directory - 8, shift)
    whole = bytes(moved) + bytes(data[8:directory])
    assert (image.read(whole, 10**6) == photo).all()
    found = image.read_with_notes(whole[: -end // 2], 10**6)
    assert found.notes == (MISSING,)
    assert (found.pixels[:100] == photo[:100]).all()
    assert not found.pixels[-20:].any()


def _move_offsets(data: bytearray, back: int, forth: int) -> None:
    """Correct a directory at 8: its own values have moved by -`back`, the strips by `forth`."""
    (count,) = struct.unpack_from("<H", data, 8)
    for at in range(10, 10 + 12 * count, 12):
        tag, kind, number, value = struct.unpack_from("<HHII", data, at)
        if number * {3: 2, 4: 4, 5: 8}.get(kind, 1) > 4:
            struct.pack_into("<I", data, at + 8, value - back)
        if tag == 273:
            for place in range(value - back, value - back + 4 * number, 4):
                struct.pack_into(
                    "<I", data, place, struct.unpack_from("<I", data, place)[0] + forth
                )


def test_a_tiff_file_that_ends_before_its_directory_is_refused_as_truncated(
    small: image.Pixels,
) -> None:
    data = file(small, "TIFF", compression="tiff_lzw")
    for end in (len(data) // 2, -2):
        with pytest.raises(PictureError, match="TIFF file is truncated: its directory"):
            image.read_with_notes(data[:end], 10**6)


def test_bytes_that_a_tiff_file_counts_too_many_are_not_missed(small: image.Pixels) -> None:
    height, width = small.shape[:2]
    data = tiff(rgb_tags(width, height), small.tobytes() + bytes(99))[:-99]
    assert (image.read(data, 10**6) == small).all()


def test_a_truncated_avif_file_is_refused_as_such(small: image.Pixels) -> None:
    data = file(small, "AVIF")
    for end in (len(data) // 2, -2):
        with pytest.raises(PictureError, match="AVIF file is truncated"):
            image.read_with_notes(data[:end], 10**6)


def test_a_jpeg_file_that_ends_between_two_scans_is_read(photo: image.Pixels) -> None:
    """libjpeg would wait for the rest of the segment between them."""
    data = file(photo, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    for end in (scans[-1] - 5, scans[-1] + 3, scans[4] + 6):
        found = image.read_with_notes(data[:end], 10**6)
        assert found.notes == (MISSING,)
        assert np.abs(found.pixels.astype(float) - photo).mean() < 15


@pytest.mark.parametrize("to_the_end", [False, True])
def test_avif_alpha_without_a_size_is_read(small: image.Pixels, to_the_end: bool) -> None:
    """Such files are in libavif's and Link-U's collections. libavif refuses them by default."""
    alpha = np.where(np.arange(small.shape[1]) < 40, 0, 255).astype(np.uint8)
    rgba = np.dstack([small, np.broadcast_to(alpha, small.shape[:2])])
    data = bytearray(file(rgba, "AVIF", quality=100))
    expected = image.read(bytes(data), 10**6)
    at = data.index(b"ipma") + 4
    assert data[at : at + 9].hex() == "000000000000000200"
    main = data[at + 10]  # number of its properties
    first = at + 11 + main + 3
    assert data[first] & 0x7F == 1  # the first property of alpha is the size of both
    data[first] = data[first + 1]
    if to_the_end:
        last = [place for _, place, _, _ in boxes.spans(bytes(data))][-1]
        data[last : last + 4] = bytes(4)
    assert (image.read(bytes(data), 10**6) == expected).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("photometric", "extra"), [(1, 2), (0, 2), (1, 1), (0, 1)])
def test_grey_tiffs_of_16_bits_with_alpha_are_read(
    order: str, photometric: int, extra: int
) -> None:
    grey, alpha = 200 << 8, np.array([0, 128 << 8, 0xFFFF])
    stored = np.full(3, grey) * alpha // 0xFFFF if extra == 1 else np.full(3, grey)
    stored = stored if photometric else 0xFFFF - stored
    pixels = np.stack([stored, alpha], -1).astype(f"{order}u2").tobytes()
    tags = rgb_tags(3, 1) | {
        258: (3, [16, 16]), 262: (3, [photometric]), 277: (3, [2]), 338: (3, [extra])
    }  # fmt: skip
    found = image.read(tiff(tags, pixels, order), 10**6)[0, :, 0]
    assert np.abs(found.astype(int) - [255, 227, 200]).max() <= 1
