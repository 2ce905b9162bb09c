"""The demo's picture: decoded pictures and a JPEG side by side, whole and zoomed in."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMN = 600
"""Width of a column in pixels."""
TITLE, GAP = 64, 8
"""Height of the titles, and the space between pictures, in pixels."""
ZOOM = 5
"""The second row shows this fraction of each side: 1/5."""
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Scales at which JPEG is tried: at few bytes per pixel, a smaller picture looks better."""


def jpeg_of_size(picture: Image.Image, size: int) -> bytes:
    """The best JPEG file of at most `size` bytes; the smallest possible one if none fits."""
    smallest = b""
    for scale in SCALES:
        width, height = (max(round(side * scale), 1) for side in picture.size)
        reduced = picture.resize((width, height), Image.Resampling.LANCZOS)
        low, high, best = 10, 95, b""
        while low <= high:
            quality = (low + high) // 2
            smallest = _jpeg(reduced, quality)
            if len(smallest) <= size:
                low, best = quality + 1, smallest
            else:
                high = quality - 1
        if best:
            return best
    return smallest


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def side_by_side(columns: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Titled pictures of one size next to each other; below, the part with the most detail.

    The first picture is the original, in which that part is found.
    """
    original = columns[0][1]
    box = most_detailed(original)
    height = max(round(COLUMN * original.height / original.width), 1)
    size = (len(columns) * (COLUMN + GAP) - GAP, TITLE + 2 * height + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=36)
    for i, (title, picture) in enumerate(columns):
        x = i * (COLUMN + GAP)
        draw.text((x + 4, TITLE // 2), title, fill="black", font=font, anchor="lm")
        whole = picture.resize((COLUMN, height), Image.Resampling.LANCZOS)
        part = picture.resize((COLUMN, height), Image.Resampling.BICUBIC, box=box)
        sheet.paste(whole, (x, TITLE))
        sheet.paste(part, (x, TITLE + height + GAP))
    return sheet


def most_detailed(picture: Image.Image) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom), 1/`ZOOM` of each side, with the strongest gradients."""
    grey = np.asarray(picture.convert("L"), np.float64)
    detail = np.zeros_like(grey)
    detail[:, 1:] += np.abs(np.diff(grey, axis=1))
    detail[1:] += np.abs(np.diff(grey, axis=0))
    height, width = (max(side // ZOOM, 1) for side in grey.shape)
    sums = _box_sums(detail, height, width)
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return left, top, left + width, top + height


def _box_sums(a: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """The sum of each box of this size in `a`, by its upper left corner."""
    total = np.pad(a.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    upper = total[:-height, width:] - total[:-height, :-width]
    lower = total[height:, width:] - total[height:, :-width]
    sums: NDArray[np.float64] = lower - upper
    return sums
