"""Picture files as cameras, scanners, renderers and interrupted uploads leave them."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from models import image
from models.errors import PictureError, PictureTooLarge, UnsupportedPicture
from models.pictures.boxes import Properties
from tests.support.data import DATA
from tests.support.pictures import Tags, chunk, grey_tags, png, rgb_tags, tiff


def file(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def first(data: bytes) -> list[int]:
    """The first pixel."""
    pixel: list[int] = image.read(data, 10**6)[0, 0].tolist()
    return pixel


GREEN = Image.new("RGB", (8, 8), (40, 160, 80))


def with_chunk(data: bytes, extra: bytes) -> bytes:
    """A PNG file with a chunk behind IHDR."""
    return data[:33] + extra + data[33:]


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"workflow\0" + bytes(3_000_000)),
        chunk(b"iCCP", b"wide\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"cHRM", bytes(5)),
        chunk(b"gAMA", bytes(1)),
        chunk(b"eXIf", b"II*\0"),
        chunk(b"pHYs", b""),
        chunk(b"acTL", b""),
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP", "cHRM", "gAMA", "eXIf", "pHYs", "acTL"],
)
def test_a_long_or_broken_png_chunk_that_is_not_needed_refuses_nothing(extra: bytes) -> None:
    assert first(with_chunk(file(GREEN), extra)) == [40, 160, 80]


@pytest.mark.parametrize("name", [b"tEXt", b"gAMA", b"iCCP", b"sRGB", b"tIME", b"tRNS"])
def test_an_ancillary_png_chunk_with_a_wrong_checksum_is_ignored(name: bytes) -> None:
    broken = chunk(name, struct.pack(">I", 100_000))[:-1] + b"?"
    assert first(with_chunk(file(GREEN), broken)) == [40, 160, 80]


def test_a_critical_png_chunk_with_a_wrong_checksum_is_named() -> None:
    palette = file(GREEN.convert("P"))
    at = palette.index(b"PLTE")
    end = at + 4 + int.from_bytes(palette[at - 4 : at], "big")
    for data, name in (
        (palette[:end] + b"????" + palette[end + 4 :], "PLTE"),
        (palette[:29] + b"????" + palette[33:], "IHDR"),
    ):
        with pytest.raises(PictureError, match=f"PNG.*{name} has a wrong checksum") as caught:
            image.read(data, 10**6)
        assert not isinstance(caught.value, UnsupportedPicture)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read(
    small: image.Pixels, progressive: bool
) -> None:
    data = file(Image.fromarray(small), "JPEG", progressive=progressive)
    whole = image.read(data, 10**6)
    for end in (1, 2):
        picture = image.read_with_notes(data[:-end], 10**6)
        assert np.array_equal(picture.pixels, whole)
        assert picture.notes == ()
    assert np.array_equal(image.read(data[:-2], 10**6), whole)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "PPM"])
def test_a_truncated_file_is_refused_unless_the_caller_asks_for_notes(
    small: image.Pixels, format: str
) -> None:
    data = file(Image.fromarray(small), format, **({"interlace": 0} if format == "GIF" else {}))
    half = data[: len(data) // 2]
    picture = image.read_with_notes(half, 10**6)
    rows = slice(-10, None) if format == "BMP" else slice(10)  # BMP begins at the bottom
    assert np.array_equal(picture.pixels[rows], image.read(data, 10**6)[rows])
    assert "truncated" in picture.notes[0]
    with pytest.raises(PictureError, match="truncated"):
        image.read(half, 10**6)


def test_a_truncated_16_bit_png_is_read_with_a_note_unless_it_has_no_pixels() -> None:
    row = np.random.default_rng(0).integers(0, 255, 64 * 6, np.uint8).tobytes()
    data = png(2, 16, row, gamma(100_000), width=64, height=64)
    assert "truncated" in image.read_with_notes(data[: len(data) // 2], 10**6).notes[0]
    with pytest.raises(PictureError, match="truncated: it has no pixels"):
        image.read_with_notes(data[: data.index(b"IDAT") + 6], 10**6)


def gamma(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", value))


SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_PRIMARIES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def primaries(values: tuple[int, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *values))


def codes(primary: int, transfer: int, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primary, transfer, 0, full]))


SRGB_PROFILE = chunk(
    b"iCCP",
    b"sRGB\0\0" + zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
)


@pytest.mark.parametrize(
    ("chunks", "seen"),
    [
        ([gamma(100_000)], 188),
        ([gamma(45_455)], 128),
        ([gamma(45_455), primaries(SRGB_PRIMARIES)], 128),
        ([gamma(0)], 128),
        ([gamma(100_000), primaries((0,) * 8)], 128),
        ([gamma(100_000), chunk(b"sRGB", b"\0")], 128),
        ([gamma(100_000), SRGB_PROFILE], 128),
        ([SRGB_PROFILE, codes(1, 8)], 188),
        ([codes(1, 13), gamma(100_000)], 128),
        ([codes(1, 13, 0)], 130),
    ],
    ids=[
        "linear", "nearly sRGB", "sRGB primaries", "0 is ignored", "impossible primaries",
        "sRGB before gamma", "profile before gamma", "codes before profile", "codes before gamma",
        "narrow range",
    ],
)  # fmt: skip
def test_a_pngs_colour_chunks_take_precedence_in_this_order(chunks: list[bytes], seen: int) -> None:
    """Half the light is 188 in sRGB."""
    data = png(2, 8, bytes([128] * 3), *chunks)
    assert np.abs(np.array(first(data)) - seen).max() <= 1


@pytest.mark.parametrize("said", [[primaries(P3_PRIMARIES)], [codes(12, 13)]])
def test_png_pictures_in_display_p3_become_srgb(said: list[bytes]) -> None:
    """Display P3 (150, 81, 60) is sRGB (161, 75, 54)."""
    assert np.abs(np.array(first(png(2, 8, bytes([150, 81, 60]), *said))) - (161, 75, 54)).max() < 3


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_pictures_are_refused_by_name(transfer: int, name: str) -> None:
    with pytest.raises(UnsupportedPicture, match=name):
        image.read(png(2, 8, bytes(3), codes(9, transfer)), 10**6)
    with pytest.raises(UnsupportedPicture, match=name):
        image.read(avif_with(9, transfer), 10**6)


def avif_with(primary: int, transfer: int) -> bytes:
    """An AVIF file of colour (150, 81, 60) with these codes."""
    data = file(Image.new("RGB", (32, 32), (150, 81, 60)), "AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primary, transfer) + data[at + 4 :]


def test_avif_pictures_in_display_p3_become_srgb() -> None:
    assert np.abs(np.array(first(avif_with(12, 13))) - (161, 75, 54)).max() <= 3
    assert np.abs(np.array(first(avif_with(1, 1))) - (150, 81, 60)).max() <= 3


def test_16_bit_samples_keep_their_shadows_when_colours_are_converted() -> None:
    values = (64, 128, 192, 300, 400, 500, 700, 900)
    seen = [3, 6, 10, 15, 18, 21, 27, 31]
    row = struct.pack(">8H", *values)
    for data in (
        png(0, 16, row, gamma(100_000), width=8),
        png(2, 16, struct.pack(">24H", *np.repeat(values, 3)), codes(1, 8), width=8),
        file(Image.fromarray(np.array([values], np.uint16)), "TIFF", icc_profile=linear_profile()),
    ):
        assert np.abs(image.read(data, 10**6)[0, :, 0].astype(int) - seen).max() <= 1


def linear_profile() -> bytes:
    """A grey ICC profile whose values are linear light."""
    tag = b"curv" + bytes(8)
    table = struct.pack(">I4sII", 1, b"kTRC", 144, len(tag))
    head = struct.pack(">I4sI4s4s4s", 156, b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head = (head.ljust(36, b"\0") + b"acsp").ljust(68, b"\0")
    return (head + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + tag


def rgb_profile() -> bytes:
    """An ICC profile of sRGB's primaries whose values are linear light."""
    columns = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
    tags = {
        name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in xyz))
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    } | {name: b"curv" + bytes(8) for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = linear_profile()[:16] + b"RGB " + linear_profile()[20:128]
    return head + table + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("alpha", [False, True])
def test_16_bit_rgb_tiffs_keep_their_shadows_when_colours_are_converted(
    order: str, alpha: bool
) -> None:
    values = np.array([64, 128, 300, 900, 30000], np.uint16)
    samples = np.repeat(values[:, None], 4 if alpha else 3, 1)
    tags = rgb_tags(5, 1, 16) | {34675: (1, list(rgb_profile()))}
    if alpha:
        samples[:, 3] = 0xFFFF
        tags |= {258: (3, [16] * 4), 277: (3, [4]), 338: (3, [2])}
    data = tiff(tags, samples.astype(f"{order}u2").tobytes(), order)
    read = image.read(data, 10**6)[0].astype(int)
    assert np.abs(read - np.array([[3, 6, 14, 31, 180]]).T).max() <= 1


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_are_decoded_in_full(kind: int, channels: int, interlaced: bool) -> None:
    """Every filter is used, and 7 passes in interlaced files."""
    width, height = 13, 11
    value = 0x1234
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),)  # fmt: skip
    raw = b""
    for x, y, dx, dy in passes:
        wide = len(range(x, width, dx))
        for row in range(len(range(y, height, dy))):
            filtered = bytes(wide * channels * 2)
            if row == 0:
                filtered = struct.pack(">H", value) * channels + filtered[channels * 2 :]
            raw += bytes([(1, 2)[row > 0]]) + filtered
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, interlaced)
    parts = chunk(b"IHDR", head), gamma(100_000), chunk(b"IDAT", zlib.compress(raw))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")
    pixels = image.read(data, 10**6)
    assert pixels.shape == (height, width, 3)
    assert (pixels == pixels[0, 0]).all()


@pytest.mark.parametrize(
    ("kind", "depth", "row", "colour", "width"),
    [
        (0, 1, b"\x40", (1,), 2),
        (0, 2, b"\x10", (1,), 2),
        (0, 4, b"\x07", (7,), 2),
        (0, 8, b"\x00\x07", (7,), 2),
        (0, 16, b"\x01\x02\x01\x03", (0x103,), 2),
        (2, 8, b"\0\0\0\1\2\3", (1, 2, 3), 2),
        (2, 16, struct.pack(">6H", 1, 2, 3, 1, 2, 4), (1, 2, 4), 2),
    ],
)
def test_a_transparent_colour_of_any_depth_becomes_white(
    kind: int, depth: int, row: bytes, colour: tuple[int, ...], width: int
) -> None:
    said = chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    pixels = image.read(png(kind, depth, row, said, width=width), 10**6)
    assert pixels[0, 1].tolist() == [255] * 3
    assert pixels[0, 0].tolist() != [255] * 3


@pytest.mark.parametrize("kind", [1, 3, 4], ids=["BYTE", "SHORT", "LONG"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_from_any_integer_type(kind: int, order: str) -> None:
    flat = tiff(grey_tags(8, 4) | {274: (kind, [6])}, bytes(range(32)), order)
    assert image.read(flat, 10**6)[0, :, 0].tolist() == [24, 16, 8, 0]
    exif = b"Exif\0\0" + tiff({274: (kind, [6])}, b"", order)
    for format in ("JPEG", "PNG", "WEBP"):
        data = file(Image.new("RGB", (64, 32)), format, exif=exif)
        assert image.read(data, 10**6).shape == (64, 32, 3), format


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP", "AVIF"])
def test_an_orientation_that_is_only_in_xmp_is_ignored(format: str) -> None:
    """Viewers use only the orientation in Exif data."""
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = file(Image.new("RGB", (64, 32)), format, xmp=xmp)
    assert image.read(data, 10**6).shape == (32, 64, 3)


def test_an_orientation_in_a_png_text_is_ignored() -> None:
    """ImageMagick writes Exif data as hexadecimal text; browsers do not read it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    packed = zlib.compress(b"\nexif\n      32\n" + exif.tobytes().hex().encode())
    extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)
    assert image.read(with_chunk(file(Image.new("RGB", (64, 32))), extra), 10**6).shape[0] == 32


@pytest.mark.parametrize("order", ["<", ">"])
def test_uncompressed_tiffs_with_planes_of_16_bits_are_read(order: str) -> None:
    planes = np.repeat(np.array([200, 80, 20], np.uint16) * 257, 4)
    tags = rgb_tags(4, 1, 16) | {284: (3, [2])}
    data = tiff_of_planes(tags, planes.astype(f"{order}u2").tobytes(), order)
    assert first(data) == [200, 80, 20]


def tiff_of_planes(tags: Tags, pixels: bytes, order: str) -> bytes:
    """A TIFF of three strips, one for each plane."""
    data = bytearray(tiff(tags, pixels, order))
    start = len(data) - len(pixels)
    third = len(pixels) // 3
    for tag, values in ((273, [start + i * third for i in range(3)]), (279, [third] * 3)):
        at = data.index(struct.pack(f"{order}HH", tag, 4))
        data[at : at + 12] = struct.pack(f"{order}HHII", tag, 4, 3, len(data))
        data += struct.pack(f"{order}3I", *values)
    return bytes(data)


@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("factor", [1, 257], ids=["8 bits", "16 bits"])
def test_a_tiff_palette_of_8_or_16_bits_is_read(depth: int, factor: int) -> None:
    colours = [value * factor for value in (200, 80, 20) for _ in range(2**depth)]
    tags = grey_tags(2, 1, depth) | {262: (3, [3]), 320: (3, colours)}
    assert first(tiff(tags, bytes(2))) == [200, 80, 20]


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (2, 2)])
def test_uncompressed_tiffs_in_ycbcr_are_read(grid: tuple[int, int]) -> None:
    luma, blue, red = Image.new("RGB", (1, 1), (200, 80, 20)).convert("YCbCr").tobytes()
    block = bytes([luma] * grid[0] * grid[1] + [blue, red])
    tags = rgb_tags(4, 4) | {262: (3, [6]), 530: (3, list(grid))}
    data = tiff(tags, block * (16 // (grid[0] * grid[1])))
    assert np.abs(np.array(first(data)) - (200, 80, 20)).max() <= 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_bigtiff_files_of_both_byte_orders_are_read(order: str) -> None:
    data = tiff(rgb_tags(2, 1) | {700: (1, [32] * 11)}, bytes([200, 80, 20] * 2), order, big=True)
    assert first(data) == [200, 80, 20]


def test_grey_tiffs_with_associated_alpha_are_read() -> None:
    tags = grey_tags(2, 1) | {258: (3, [8, 8]), 277: (3, [2]), 338: (3, [1])}
    assert first(tiff(tags, bytes([64, 128] * 2))) == [191] * 3


@pytest.mark.parametrize("tags", [{262: (3, [32803])}, {50706: (1, [1, 4, 0, 0])}])
def test_camera_raw_files_are_refused_by_name(tags: Tags) -> None:
    with pytest.raises(UnsupportedPicture, match="camera's raw"):
        image.read(tiff(grey_tags(2, 1) | tags, bytes(2)), 10**6)


def test_an_unknown_compression_of_a_tiff_is_unsupported() -> None:
    with pytest.raises(UnsupportedPicture, match="TIFF.*compression 34712"):
        image.read(tiff(grey_tags(2, 1) | {259: (3, [34712])}, bytes(2)), 10**6)


def test_the_canvas_around_a_small_first_frame_of_a_gif_is_white() -> None:
    data = bytearray(file(Image.new("P", (4, 4), 0), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    pixels = image.read(bytes(data), 10**6)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[4:] == 255).all()
    assert (pixels[:4, :4] == 0).all()


@pytest.mark.parametrize(
    ("bits", "masks", "values"),
    [
        (32, (0x3FF00000, 0xFFC00, 0x3FF, 0), (0x3FF00000, 0x3FF)),
        (16, (0xF00, 0xF0, 0xF, 0xF000), (0xFF00, 0xF00F)),
    ],
    ids=["10 bits", "4 bits"],
)
def test_bmp_files_with_any_bit_fields_are_read(
    bits: int, masks: tuple[int, ...], values: tuple[int, int]
) -> None:
    row = struct.pack("<2" + {16: "H", 32: "I"}[bits], *values).ljust(8, b"\0")[: bits // 4]
    head = struct.pack("<IiiHHIIiiII", 56, 2, 1, 1, bits, 3, len(row), 0, 0, 0, 0)
    body = head + struct.pack("<4I", *masks) + row
    data = b"BM" + struct.pack("<III", 14 + len(body), 0, 14 + 56) + body
    assert image.read(data, 10**6)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    with pytest.raises(PictureError, match="BMP file is truncated"):
        image.read(data[:-1], 10**6)


def test_a_clean_aperture_is_a_box_within_the_picture() -> None:
    half = (Fraction(32), Fraction(64), Fraction(16), Fraction(0))
    assert Properties(aperture=half).crop(64, 64) == (32, 0, 64, 64)
    whole = (Fraction(64), Fraction(64), Fraction(0), Fraction(0))
    assert Properties(aperture=whole).crop(64, 64) is None
    outside = (Fraction(64), Fraction(64), Fraction(1), Fraction(0))
    assert Properties(aperture=outside).crop(64, 64) is None


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "PSD"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
    ],
)
def test_formats_that_are_not_read_are_named(
    data: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedPicture, match=name):
        image.read(data, 10**6)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"GIF89a", "GIF"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
        (b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", "AVIF"),
    ],
)
def test_broken_files_of_a_known_format_are_reported_as_broken(data: bytes, name: str) -> None:
    with pytest.raises(PictureError, match=name) as caught:
        image.read(data, 10**6)
    assert not isinstance(caught.value, UnsupportedPicture)


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_and_alpha_in_separate_planes_are_unsupported(depth: int) -> None:
    """Pillow would read them as transparent."""
    tags = rgb_tags(4, 1, depth) | {
        258: (3, [depth] * 2), 262: (3, [1]), 277: (3, [2]), 284: (3, [2]), 338: (3, [2])
    }  # fmt: skip
    with pytest.raises(UnsupportedPicture, match="grey and alpha in separate planes"):
        image.read(tiff(tags, bytes(16)), 10**6)


def test_samples_of_unknown_meaning_beside_16_bit_grey_are_ignored() -> None:
    tags = rgb_tags(1, 1) | {
        258: (3, [16, 16]), 262: (3, [1]), 277: (3, [2]), 338: (3, [0])
    }  # fmt: skip
    assert first(tiff(tags, struct.pack("<2H", 200 << 8, 0))) == [200] * 3


def test_signed_samples_are_unsupported() -> None:
    tags = grey_tags(1, 1, 16) | {339: (3, [2])}
    with pytest.raises(UnsupportedPicture, match="signed samples"):
        image.read(tiff(tags, struct.pack("<h", -5)), 10**6)


def test_a_form_that_is_sent_as_a_picture_is_told_from_one() -> None:
    """As curl sends -F with a Content-Type of the user's own."""
    form = b'--xx\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + file(GREEN)
    with pytest.raises(UnsupportedPicture, match="it is a form; send the Content-Type"):
        image.read(form, 10**6)


@pytest.mark.parametrize(("marker", "name"), [(b"\xc3", "lossless"), (b"\xf7", "JPEG-LS")])
def test_a_lossless_jpeg_is_unsupported(marker: bytes, name: str) -> None:
    data = file(GREEN, "JPEG").replace(b"\xff\xc0", b"\xff" + marker)
    with pytest.raises(UnsupportedPicture, match=name):
        image.read(data, 10**6)


def test_jpeg_xl_files_are_read_where_the_extra_is_installed() -> None:
    pytest.importorskip("pillow_jxl")
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    data = file(Image.fromarray(pixels), "JXL", lossless=True)
    assert np.array_equal(image.read(data, 10**6), pixels)
    with pytest.raises(PictureTooLarge, match="64×48"):
        image.read(data, 1000)


@pytest.mark.parametrize("module", ["pi_heif", "pillow_jxl"])
def test_broken_heic_and_jpeg_xl_files_are_named(module: str) -> None:
    pytest.importorskip(module)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    data, name = {"pi_heif": (heic, "HEIC"), "pillow_jxl": (b"\xff\x0a\0\0\0", "JPEG XL")}[module]
    with pytest.raises(PictureError, match=name) as caught:
        image.read(data, 10**6)
    assert not isinstance(caught.value, UnsupportedPicture)


QUADRANTS = [[200, 80, 20], [40, 160, 80], [20, 60, 180], [220, 220, 220]]
"""Colours of tests/data/quadrants*.heic: upper left, upper right, lower left, lower right."""


def quadrants(pixels: image.Pixels) -> list[list[int]]:
    height, width = pixels.shape[:2]
    rows, columns = ([side // 4, 3 * side // 4] for side in (height, width))
    return [pixels[y, x].tolist() for y in rows for x in columns]


@pytest.mark.parametrize(
    ("name", "order", "transparent"),
    [
        ("quadrants", [0, 1, 2, 3], set()),
        ("quadrants-10bit", [0, 1, 2, 3], set()),
        ("quadrants-alpha", [0, 1, 2, 3], {1, 3}),
        ("quadrants-irot", [2, 0, 3, 1], set()),
    ],
)
def test_heic_files_are_read_where_the_extra_is_installed(
    name: str, order: list[int], transparent: set[int]
) -> None:
    """8 and 10 bits, transparent pixels, and an orientation in irot and Exif, applied once."""
    pytest.importorskip("pi_heif")
    data = (DATA / f"{name}.heic").read_bytes()
    pixels = image.read(data, 10**6)
    assert pixels.shape == ((64, 48, 3) if name.endswith("irot") else (48, 64, 3))
    expected = [[255] * 3 if at in transparent else QUADRANTS[at] for at in order]
    assert np.abs(np.array(quadrants(pixels)) - expected).max() <= 3
    with pytest.raises(PictureTooLarge):
        image.read(data, 1000)
    with pytest.raises(PictureError, match="HEIC"):
        image.read(data[:-50], 10**6)


def test_an_orientation_in_the_exif_data_of_a_jpeg_xl_file_is_ignored() -> None:
    """ISO/IEC 18181-2: the orientation in the codestream counts, and libjxl applies it."""
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file(Image.new("RGB", (64, 32)), "JXL", exif=exif.tobytes())
    assert image.read(data, 10**6).shape == (32, 64, 3)


def test_transparent_pixels_of_jpeg_xl_become_white() -> None:
    pytest.importorskip("pillow_jxl")
    data = file(Image.new("RGBA", (16, 16), (200, 80, 20, 0)), "JXL", lossless=True)
    assert first(data) == [255] * 3
