"""The demo's picture."""

import io

import numpy as np
from PIL import Image

from models import image
from service.cli.sheet import COLUMN, GAP, ZOOM, jpeg_of_size, most_detailed, side_by_side


def test_a_jpeg_is_the_largest_that_fits(photo: image.Pixels) -> None:
    picture = Image.fromarray(photo)
    for size in (3000, 8000, 30000):
        file = jpeg_of_size(picture, size)
        assert 0.9 * size < len(file) <= size
        assert file.startswith(b"\xff\xd8")


def test_a_jpeg_of_few_bytes_is_shrunk_and_the_smallest_is_made_if_none_fits(
    photo: image.Pixels,
) -> None:
    picture = Image.fromarray(photo)
    with Image.open(io.BytesIO(jpeg_of_size(picture, 3000))) as shrunk:
        assert shrunk.width < picture.width
    assert 0 < len(jpeg_of_size(picture, 10)) < 2000


def test_the_zoomed_part_is_where_the_detail_is() -> None:
    pixels = np.zeros((100, 150, 3), np.uint8)
    pixels[60:75, 100:120] = np.random.default_rng(0).integers(0, 255, (15, 20, 3))
    left, top, right, bottom = most_detailed(Image.fromarray(pixels))
    assert (right - left, bottom - top) == (150 // ZOOM, 100 // ZOOM)
    assert left <= 101 and right >= 119 and top <= 61 and bottom >= 74


def test_a_sheet_has_a_column_for_each_picture_and_a_zoomed_row() -> None:
    for size in ((300, 200), (1, 1), (4, 60)):
        columns = [("original", Image.new("RGB", size, "red")), ("other", Image.new("RGB", size))]
        sheet = side_by_side(columns)
        assert sheet.width == 2 * COLUMN + GAP
        assert sheet.getpixel((COLUMN // 2, sheet.height - 1)) == (255, 0, 0)
        assert sheet.getpixel((COLUMN + GAP + 9, sheet.height - 1)) == (0, 0, 0)
