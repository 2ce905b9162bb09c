"""Reading and writing picture files."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from models import image
from models.errors import PictureError, PictureTooLarge, UnsupportedPicture
from tests.support.data import psnr
from tests.support.pictures import png


def file(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_formats_round_trip_exactly(
    small: image.Pixels, format: image.OutputFormat
) -> None:
    assert np.array_equal(image.read(image.write(small, format), 10**6), small)


@pytest.mark.parametrize("format", ["jpeg", "avif"])
def test_lossy_formats_round_trip_closely(small: image.Pixels, format: image.OutputFormat) -> None:
    assert psnr(image.read(image.write(small, format), 10**6), small) > 38


def test_npy_files_hold_the_array_without_metadata(small: image.Pixels) -> None:
    array = np.load(io.BytesIO(image.write(small, "npy", {"tier": "x"})), allow_pickle=False)
    assert array.dtype == np.uint8
    assert np.array_equal(array, small)


@pytest.mark.parametrize("format", sorted(image.MEDIA_TYPES))
def test_every_format_matches_its_media_type(
    small: image.Pixels, format: image.OutputFormat
) -> None:
    data = image.write(small, format)
    if format == "npy":
        assert data.startswith(b"\x93NUMPY")
    else:
        with Image.open(io.BytesIO(data)) as p:
            assert p.get_format_mimetype() == image.MEDIA_TYPES[format]
    assert format in image.SUFFIXES.values()


def test_png_files_hold_metadata_as_text_chunks(small: image.Pixels) -> None:
    with Image.open(io.BytesIO(image.write(small, "png", {"tier": "ddim-10"}))) as p:
        assert p.info["tier"] == "ddim-10"


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_other_formats_hold_metadata_as_exif(
    small: image.Pixels, format: image.OutputFormat
) -> None:
    text = {"Software": "Afterimage", "Comment": "synthesised detail", "afterimage:seed": "7"}
    with Image.open(io.BytesIO(image.write(small, format, text))) as p:
        exif = p.getexif()
    assert exif[ExifTags.Base.Software] == "Afterimage"
    description = exif[ExifTags.Base.ImageDescription]
    assert description == "Comment: synthesised detail\nafterimage:seed: 7"


def test_the_error_names_a_size_that_the_format_cannot_hold() -> None:
    with pytest.raises(PictureError, match="16384×1 pixels cannot be written as webp"):
        image.write(np.zeros((1, 16384, 3), np.uint8), "webp")


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
"""EXIF orientation -> what makes the stored rows upright."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_exif_orientation_is_applied(small: image.Pixels, format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"speed": 10},
    }  # fmt: skip
    data = file(Image.fromarray(small), format, exif=exif, **options.get(format, {}))
    assert apart(image.read(data, 10**6), TURNS[orientation](small)) < 3


def apart(a: image.Pixels, b: image.Pixels) -> float:
    """Mean difference, in 1/255."""
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_transparent_pixels_are_blended_with_white(format: str) -> None:
    options: dict[str, dict[str, Any]] = {"AVIF": {"quality": 100}, "WEBP": {"lossless": True}}
    for alpha, expected in ((0, (255, 255, 255)), (128, (255, 127, 127)), (255, (255, 0, 0))):
        data = file(
            Image.new("RGBA", (8, 8), (255, 0, 0, alpha)), format, **options.get(format, {})
        )
        assert np.abs(image.read(data, 10**6)[0, 0].astype(int) - expected).max() <= 2


def test_a_transparent_colour_becomes_white() -> None:
    """In a GIF, and in PNGs with palette, grey and RGB."""
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for data in (
        file(palette, "GIF", transparency=1),
        file(palette, "PNG", transparency=1),
        file(Image.new("L", (8, 8), 25), "PNG", transparency=25),
        file(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    ):
        assert (image.read(data, 10**6) == 255).all()
    assert tuple(image.read(file(palette, "GIF"), 10**6)[0, 0]) == (0, 255, 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "LAB", "YCbCr"])
def test_other_modes_become_rgb(small: image.Pixels, mode: str) -> None:
    source = Image.fromarray(small)
    stored = lab(source) if mode == "LAB" else source.convert(mode)
    pixels = image.read(file(stored, "TIFF"), 10**6)
    assert pixels.shape == small.shape
    if mode in {"CMYK", "LAB", "YCbCr"}:
        assert apart(pixels, small) < 3


def lab(picture: Image.Image) -> Image.Image:
    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(picture, srgb, target, outputMode="LAB")
    assert converted is not None
    return converted


def test_cmyk_jpegs_become_rgb() -> None:
    data = file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(image.read(data, 10**6)[0, 0].astype(int) - (255, 0, 0)).max() <= 2


def test_16_bit_grey_keeps_its_upper_8_bits() -> None:
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels = image.read(file(Image.fromarray(values)), 10**6)
    assert np.array_equal(pixels[..., 0], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("stored", "tags", "seen"),
    [
        ((0, 0xFF00), {"PhotometricInterpretation": 0}, [255, 0]),
        ((0xF0FF, 0x0000), {"BitsPerSample": 12}, [255, 0]),
    ],
    ids=["white is zero", "12 bits"],
)
def test_grey_tiffs_of_12_bits_and_with_white_as_zero_are_converted(
    stored: tuple[int, int], tags: dict[str, int], seen: list[int]
) -> None:
    data = bytearray(file(Image.fromarray(np.array([stored], np.uint16)), "TIFF"))
    for name, value in tags.items():
        tag = data.index(struct.pack("<HHI", ExifTags.Base[name], 3, 1))
        data[tag + 8] = value
    assert image.read(bytes(data), 10**6)[0, :, 0].tolist() == seen


@pytest.mark.parametrize(
    ("kind", "samples", "seen"),
    [
        (2, (0xFFFF, 0x1234, 0), (255, 0x12, 0)),
        (6, (0xFFFF, 0, 0, 0xFFFF), (255, 0, 0)),
        (6, (0xFFFF, 0, 0, 0x8000), (255, 127, 127)),
        (4, (0x4000, 0xFFFF), (64, 64, 64)),
    ],
    ids=["RGB", "opaque RGBA", "RGBA", "grey and alpha"],
)
def test_16_bit_colour_keeps_its_upper_8_bits(
    kind: int, samples: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    data = png(kind, 16, struct.pack(f">{len(samples)}H", *samples))
    assert tuple(image.read(data, 10**6)[0, 0]) == seen


def test_an_srgb_profile_changes_nothing(small: image.Pixels) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = file(Image.fromarray(small), icc_profile=profile)
    assert np.abs(image.read(data, 10**6).astype(int) - small).max() <= 1


def profile(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2 with these tags."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(tag))
        body += tag.ljust(-(-len(tag) // 4) * 4, b"\0")
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"prtr", space, connection
    )
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    return (
        (head.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + white.ljust(60, b"\0") + table + body
    )


LINEAR = profile(
    b"GRAY", b"XYZ ",
    wtpt=b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
    kTRC=b"curv" + bytes(8),
)  # fmt: skip
"""A grey profile whose values are linear light."""


def test_a_grey_profile_is_applied_at_8_and_16_bits() -> None:
    """Half the light is 188 in sRGB."""
    for data in (
        file(Image.new("L", (8, 8), 128), icc_profile=LINEAR),
        file(Image.new("LA", (8, 8), (128, 255)), icc_profile=LINEAR),
        file(Image.new("L", (8, 8), 128), icc_profile=LINEAR, transparency=5),
        file(Image.fromarray(np.full((8, 8), 0x8080, np.uint16)), icc_profile=LINEAR),
    ):
        assert np.abs(image.read(data, 10**6).astype(int) - 188).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_cmyk_profile_is_applied(format: str) -> None:
    """With a profile in which coloured inks are grey, alone and together."""
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp
    inks = profile(
        b"CMYK", b"Lab ", A2B0=table + 8 * bytes([128, 128, 128, 0, 128, 128]) + 3 * ramp
    )
    data = file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format, icc_profile=inks)
    assert np.abs(image.read(data, 10**6).astype(int) - 119).max() <= 2


def test_a_profile_leaves_transparency_unchanged() -> None:
    data = file(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), icc_profile=swapped_profile())
    red, green, blue = image.read(data, 10**6)[0, 0].tolist()
    assert green > red > 120
    assert blue > 120


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_data_are_ignored(small: image.Pixels, format: str, exif: bytes) -> None:
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    data = file(Image.fromarray(small), format, exif=exif, **options.get(format, {}))
    assert apart(image.read(data, 10**6), small) < 3


def test_a_broken_profile_is_ignored(small: image.Pixels) -> None:
    data = file(Image.fromarray(small), icc_profile=b"nonsense")
    assert np.array_equal(image.read(data, 10**6), small)


def test_too_many_pixels_are_refused(small: image.Pixels) -> None:
    with pytest.raises(PictureTooLarge, match="150×100"):
        image.read(file(Image.fromarray(small)), 100)


def test_a_very_thin_picture_is_refused_because_of_its_padding() -> None:
    with pytest.raises(PictureTooLarge, match="side"):
        image.read(file(Image.new("L", (20_000, 1))), 10**6)


def tiled(pixels: image.Pixels, big: bool, kind: int = 3, count: int = 1) -> bytes:
    """A TIFF file that declares tiles of 30000×30000, the width with this field type and count."""
    private = {0xFF00: ExifTags.Base.TileWidth, 0xFF01: ExifTags.Base.TileLength}
    tags = dict.fromkeys(private, 30_000)
    data = file(Image.fromarray(pixels), "TIFF", tiffinfo=tags, big_tiff=big)
    entry = "<HHQ" if big else "<HHI"
    for given, meant in private.items():
        width = meant == ExifTags.Base.TileWidth
        said = struct.pack(entry, meant, kind if width else 3, count if width else 1)
        assert data.count(struct.pack(entry, given, 3, 1)) == 1
        data = data.replace(struct.pack(entry, given, 3, 1), said)
    return data


@pytest.mark.parametrize("big", [False, True])
def test_tiff_files_with_huge_tiles_are_refused(small: image.Pixels, big: bool) -> None:
    """libtiff unpacks whole tiles, even if they are larger than the picture."""
    with pytest.raises(PictureTooLarge, match="tiles of 30000×30000"):
        image.read(tiled(small, big), 10**6)


@pytest.mark.parametrize(("kind", "count"), [(2, 1), (1, 1), (17, 1), (3, 2)])
def test_tiff_files_whose_tile_sides_are_not_single_integers_are_refused(
    small: image.Pixels, kind: int, count: int
) -> None:
    """libtiff reads fields that Pillow skips, and multiplying text needed much memory."""
    with pytest.raises(PictureError, match="tile sides are not integers"):
        image.read(tiled(small, False, kind, count), 10**6)


def test_a_jpeg_with_more_than_1000_scans_is_refused(small: image.Pixels) -> None:
    """Each scan is decoded over the whole picture, even if it has few bytes."""
    data = file(Image.fromarray(small), "JPEG", progressive=True)
    assert image.read(data, 10**6).shape == small.shape
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(PictureError, match="1000 scans"):
        image.read(data[:-2] + last * 1000 + data[-2:], 10**6)


def test_a_profile_is_applied_to_palette_pictures_too() -> None:
    """With a profile that swaps red and green, on red as RGB and as palette."""
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


def test_samples_of_more_than_16_bits_are_refused() -> None:
    for value in (-5, 2**24):
        data = file(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF")
        with pytest.raises(UnsupportedPicture, match="16 bits"):
            image.read(data, 10**6)


def test_eps_and_ico_files_are_refused(small: image.Pixels) -> None:
    for data in (file(Image.fromarray(small), "EPS"), file(Image.fromarray(small), "ICO")):
        with pytest.raises(UnsupportedPicture):
            image.read(data, 10**6)


def test_damaged_files_raise_picture_errors(small: image.Pixels) -> None:
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
def test_files_that_are_not_pictures_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedPicture):
        image.read(data, 10**6)


@pytest.mark.parametrize("end", [0, 60, 2000])
def test_an_empty_or_truncated_picture_raises_an_error(small: image.Pixels, end: int) -> None:
    with pytest.raises(PictureError):
        image.read(image.write(small, "png")[:end], 10**6)
