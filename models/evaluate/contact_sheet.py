"""Contact sheets: crops of all tiers side by side, and the best and worst of `perceptual`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import uniform_filter
from torch import Tensor

from models.codec import codec
from models.evaluate import baselines
from models.evaluate.measure import INSTANT, NAMES, ORIGINAL, PERCEPTUAL
from models.evaluate.metrics import LpipsAlex
from models.image import Pixels

CROP = 112
"""Side of a crop in pixels of the picture."""
SCALE = 2
"""Enlargement of the crops on the sheet."""
PICTURES = 4
"""Number of pictures on the contact sheet, spread evenly over the folder."""
BEST = 3
"""Number of pictures whose best crop is shown; the worst crop of all pictures follows."""
TierCrops = dict[str, Pixels]
"""Tier -> a crop (h, w, 3)."""
_GAP, _LINE = 8, 24
"""Space between crops, and height of a line of text, in pixels of the sheet."""


class Sheet:
    """Contact sheet; it collects crops one picture at a time and keeps no whole picture."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: all pictures that `add` will get; `PICTURES` of them are shown."""
        indices = np.linspace(0, len(names) - 1, min(PICTURES, len(names))).round()
        self._selected = {names[int(i)] for i in indices}
        self._corners: dict[str, tuple[int, int]] = {}
        self._rows: list[tuple[str, int, str, TierCrops]] = []

    def add(self, name: str, quality: int, bpp: float, pictures: Mapping[str, Tensor]) -> None:
        """Crop `pictures`, each (1, 3, H, W), where they differ most; ignore unselected names.

        All qualities of a picture are cropped at the same place.
        """
        if name not in self._selected:
            return
        if name not in self._corners:
            self._corners[name] = corner(*_pair_to_compare(pictures))
        top, left = self._corners[name]
        crops = {
            tier: codec.to_pixels(p[:, :, top : top + CROP, left : left + CROP])
            for tier, p in pictures.items()
        }
        self._rows.append((name, quality, f"{name}   quality {quality}   {bpp:.3f} bpp", crops))

    def save(self, file: Path) -> None:
        """Write the sheet, sorted by picture and quality."""
        rows = sorted(self._rows, key=lambda row: row[:2])
        _draw([(text, crops) for _, _, text, crops in rows], file)


class BestAndWorst:
    """Crops in which `perceptual` has the largest gain and the largest loss of LPIPS."""

    def __init__(self, lpips: LpipsAlex) -> None:
        self._lpips = lpips
        self._crops: list[tuple[float, str, str, TierCrops]] = []

    def add(self, name: str, quality: int, pictures: Mapping[str, Tensor]) -> None:
        """Find the best and the worst crop of a picture; `pictures` maps tiers to (1, 3, H, W)."""
        tiers = (ORIGINAL, INSTANT, PERCEPTUAL)
        if any(tier not in pictures for tier in tiers):
            return
        height, width = pictures[ORIGINAL].shape[2:]
        candidates = []
        for top in range(0, height - CROP + 1, CROP):
            for left in range(0, width - CROP + 1, CROP):
                crops = [pictures[t][:, :, top : top + CROP, left : left + CROP] for t in tiers]
                before, after = (self._lpips(crop, crops[0]) for crop in crops[1:])
                text = f"{name}   quality {quality}   LPIPS {before:.2f}, {after:.2f}"
                pixels = dict(zip(tiers, map(codec.to_pixels, crops), strict=True))
                candidates.append((after - before, name, text, pixels))
        candidates.sort(key=lambda crop: crop[0])
        self._crops += candidates[:1] + candidates[1:][-1:]

    def save(self, file: Path) -> bool:
        """Write the best crops of the `BEST` pictures with the largest gain, then the worst crop.

        Returns False and writes nothing if there are no crops.
        """
        order = sorted(self._crops, key=lambda crop: crop[0])
        if not order:
            return False
        best_by_picture = {crop[1]: crop for crop in reversed(order)}
        best = sorted(best_by_picture.values(), key=lambda crop: crop[0])[:BEST]
        rows = [(text, crops) for _, _, text, crops in (*best, order[-1])]
        _draw(rows, file)
        return True


def _draw(rows: Sequence[tuple[str, TierCrops]], file: Path) -> None:
    """Draw a row of enlarged crops below each text, with one column per tier."""
    present = {tier for _, crops in rows for tier in crops}
    columns = [tier for tier in (ORIGINAL, *NAMES, *baselines.NAMES) if tier in present]
    cell, height = CROP * SCALE + _GAP, CROP * SCALE + _GAP + _LINE
    size = (_GAP + cell * len(columns), _LINE + _GAP + height * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, tier in enumerate(columns):
        draw.text((_GAP + i * cell, _GAP), tier, "black", font)
    for j, (text, crops) in enumerate(rows):
        y = _LINE + _GAP + j * height
        draw.text((_GAP, y), text, "dimgray", font)
        for tier, pixels in crops.items():
            enlarged = pixels.repeat(SCALE, 0).repeat(SCALE, 1)
            x = _GAP + columns.index(tier) * cell
            sheet.paste(Image.fromarray(enlarged), (x, y + _LINE))
    sheet.save(file, quality=90)  # `SCALE` of 2: 4:2:0 chroma loses nothing


def corner(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Top and left of the crop with the largest squared difference of `a` and `b`, (1, 3, H, W)."""
    energy = (a - b).square().sum(1)[0].numpy()
    height, width = energy.shape
    side = (min(CROP, height), min(CROP, width))
    means = uniform_filter(energy.astype(np.float64), side, mode="constant")
    half = (side[0] // 2, side[1] // 2)  # a filter's output is at the centre of its window
    inside = means[
        half[0] : height - side[0] + half[0] + 1, half[1] : width - side[1] + half[1] + 1
    ]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return int(top), int(left)


def _pair_to_compare(pictures: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The instant and the perceptual picture; others in their place if one is missing."""
    decodes = [tier for tier in pictures if tier != ORIGINAL]
    first = INSTANT if INSTANT in decodes else ORIGINAL
    others = [tier for tier in decodes if tier != first] or [ORIGINAL]
    return pictures[first], pictures[PERCEPTUAL if PERCEPTUAL in others else others[0]]
