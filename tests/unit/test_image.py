"""Picture files in and out."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from models import image
from models.errors import PictureError, PictureTooLarge, UnsupportedPicture


def file(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def test_a_png_comes_back_to_the_digit(small: image.Pixels) -> None:
    assert np.array_equal(image.read(image.write(small, "png"), 10**6), small)
    assert np.array_equal(image.read(image.write(small, "webp"), 10**6), small)


def test_metadata_is_written(small: image.Pixels) -> None:
    with Image.open(io.BytesIO(image.write(small, "png", {"tier": "ddim-10"}))) as p:
        assert p.info["tier"] == "ddim-10"


def test_exif_orientation_is_applied(small: image.Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = file(Image.fromarray(small), "JPEG", exif=exif, quality=95)
    assert image.read(data, 10**6).shape == (150, 100, 3)


def test_transparency_is_flattened_on_white() -> None:
    data = file(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert (image.read(data, 10**6) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(small: image.Pixels, mode: str) -> None:
    data = file(Image.fromarray(small).convert(mode), "TIFF")
    assert image.read(data, 10**6).shape == small.shape


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels = image.read(file(Image.fromarray(values)), 10**6)
    assert np.array_equal(pixels[..., 0], (values >> 8).astype(np.uint8))


def test_an_srgb_profile_changes_nothing(small: image.Pixels) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = file(Image.fromarray(small), icc_profile=profile)
    assert np.abs(image.read(data, 10**6).astype(int) - small).max() <= 1


def test_a_broken_profile_is_ignored(small: image.Pixels) -> None:
    data = file(Image.fromarray(small), icc_profile=b"nonsense")
    assert np.array_equal(image.read(data, 10**6), small)


def test_too_many_pixels_are_refused(small: image.Pixels) -> None:
    with pytest.raises(PictureTooLarge, match="150×100"):
        image.read(file(Image.fromarray(small)), 100)


def test_a_thread_of_pixels_is_refused_for_its_padding() -> None:
    with pytest.raises(PictureTooLarge, match="side"):
        image.read(file(Image.new("L", (20_000, 1))), 10**6)


def test_a_profile_means_the_same_for_palette_pictures() -> None:
    """A profile that swaps red and green, on the same red in three modes."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    profile = swapped_profile()
    seen = [image.read(file(p, icc_profile=profile), 10**6)[0, 0] for p in (red, red.convert("P"))]
    assert np.array_equal(seen[0], seen[1])
    assert seen[0][1] > seen[0][0]


def swapped_profile() -> bytes:
    """sRGB with the tags of its red and green primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def test_more_than_16_bits_are_refused() -> None:
    for value in (-5, 2**24):
        data = file(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF")
        with pytest.raises(UnsupportedPicture, match="16 bits"):
            image.read(data, 10**6)


def test_formats_that_run_programs_or_unpack_early_are_not_read(small: image.Pixels) -> None:
    for data in (file(Image.fromarray(small), "EPS"), file(Image.fromarray(small), "ICO")):
        with pytest.raises(UnsupportedPicture):
            image.read(data, 10**6)


def test_damaged_files_are_picture_errors(small: image.Pixels) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    read = 0
    for name in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"):
        options = {"exif": exif} if name == "JPEG" else {}
        good = file(Image.fromarray(small[:40, :40].copy()), name, **options)
        for _ in range(150):
            bad = bytearray(good)
            for at in rng.integers(0, min(len(bad), 600), 3):
                bad[at] = rng.integers(256)
            try:
                image.read(bytes(bad), 10**5)
                read += 1
            except (PictureError, PictureTooLarge):
                continue
    assert read < 7 * 150


@pytest.mark.parametrize("data", [b"hello", bytes(100)])
def test_what_is_no_picture_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedPicture):
        image.read(data, 10**6)


@pytest.mark.parametrize("end", [0, 60, 2000])
def test_an_empty_or_truncated_picture_is_an_error(small: image.Pixels, end: int) -> None:
    with pytest.raises(PictureError):
        image.read(image.write(small, "png")[:end], 10**6)
