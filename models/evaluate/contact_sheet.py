"""Cuts side by side: a contact sheet of all decodes, and the best and the worst of `perceptual`."""

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

CUT = 112
"""Side of a cut in the picture's pixels."""
SCALE = 2
"""Each pixel is drawn twice as wide and high, so that it can be seen."""
PICTURES = 4
"""How many pictures are shown, spread over the folder."""
BEST = 3
"""How many pictures' best cuts are shown, besides the worst."""
Cuts = dict[str, Pixels]
"""Tier -> a cut (h, w, 3)."""
_GAP, _LINE = 8, 24
"""Between cuts, and for a line of text; in the sheet's pixels."""


class Sheet:
    """Collects cuts while pictures pass, so that no whole picture is kept."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` of all pictures that will come; some of them are shown."""
        places = np.linspace(0, len(names) - 1, min(PICTURES, len(names))).round()
        self._shown = {names[int(i)] for i in places}
        self._corners: dict[str, tuple[int, int]] = {}
        self._rows: list[tuple[str, int, str, Cuts]] = []

    def add(self, name: str, quality: int, bpp: float, pictures: Mapping[str, Tensor]) -> None:
        """Cut `pictures`, each (1, 3, H, W), where they differ most; one place per picture."""
        if name not in self._shown:
            return
        if name not in self._corners:
            self._corners[name] = corner(*_compared(pictures))
        top, left = self._corners[name]
        cuts = {
            tier: codec.to_pixels(p[:, :, top : top + CUT, left : left + CUT])
            for tier, p in pictures.items()
        }
        self._rows.append((name, quality, f"{name}   quality {quality}   {bpp:.3f} bpp", cuts))

    def save(self, file: Path) -> None:
        """Draw all rows, pictures in order and their qualities together."""
        rows = sorted(self._rows, key=lambda row: row[:2])
        _draw([(text, cuts) for _, _, text, cuts in rows], file)


class Crops:
    """Where `perceptual` comes nearer to the original than `instant`, by LPIPS, and where not."""

    def __init__(self, lpips: LpipsAlex) -> None:
        self._lpips = lpips
        self._found: list[tuple[float, str, str, Cuts]] = []

    def add(self, name: str, quality: int, pictures: Mapping[str, Tensor]) -> None:
        """The best and the worst cut of a picture; `pictures` (1, 3, H, W) by tier."""
        tiers = (ORIGINAL, INSTANT, PERCEPTUAL)
        if any(tier not in pictures for tier in tiers):
            return
        height, width = pictures[ORIGINAL].shape[2:]
        found = []
        for top in range(0, height - CUT + 1, CUT):
            for left in range(0, width - CUT + 1, CUT):
                cuts = [pictures[t][:, :, top : top + CUT, left : left + CUT] for t in tiers]
                before, after = (self._lpips(cut, cuts[0]) for cut in cuts[1:])
                text = f"{name}   quality {quality}   LPIPS {before:.2f}, {after:.2f}"
                pixels = dict(zip(tiers, map(codec.to_pixels, cuts), strict=True))
                found.append((after - before, name, text, pixels))
        found.sort(key=lambda cut: cut[0])
        self._found += found[:1] + found[1:][-1:]

    def save(self, file: Path) -> bool:
        """The best of the `BEST` pictures that gain most, then the worst of all; whether any."""
        order = sorted(self._found, key=lambda cut: cut[0])
        if not order:
            return False
        of_each = {cut[1]: cut for cut in reversed(order)}  # its best
        best = sorted(of_each.values(), key=lambda cut: cut[0])[:BEST]
        rows = [(text, cuts) for _, _, text, cuts in (*best, order[-1])]
        _draw(rows, file)
        return True


def _draw(rows: Sequence[tuple[str, Cuts]], file: Path) -> None:
    """A row of enlarged cuts below each text, a column per tier."""
    shown = {tier for _, cuts in rows for tier in cuts}
    columns = [tier for tier in (ORIGINAL, *NAMES, *baselines.NAMES) if tier in shown]
    cell, height = CUT * SCALE + _GAP, CUT * SCALE + _GAP + _LINE
    size = (_GAP + cell * len(columns), _LINE + _GAP + height * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, tier in enumerate(columns):
        draw.text((_GAP + i * cell, _GAP), tier, "black", font)
    for j, (text, cuts) in enumerate(rows):
        y = _LINE + _GAP + j * height
        draw.text((_GAP, y), text, "dimgray", font)
        for tier, pixels in cuts.items():
            enlarged = pixels.repeat(SCALE, 0).repeat(SCALE, 1)
            x = _GAP + columns.index(tier) * cell
            sheet.paste(Image.fromarray(enlarged), (x, y + _LINE))
    sheet.save(file, quality=90)  # pixels twice as wide: halved chroma takes nothing from them


def corner(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Top and left of the cut in which `a` and `b`, (1, 3, H, W), differ by most energy."""
    energy = (a - b).square().sum(1)[0].numpy()
    height, width = energy.shape
    side = (min(CUT, height), min(CUT, width))
    means = uniform_filter(energy.astype(np.float64), side, mode="constant")
    half = (side[0] // 2, side[1] // 2)  # a filter's value stands at its middle
    inside = means[
        half[0] : height - side[0] + half[0] + 1, half[1] : width - side[1] + half[1] + 1
    ]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return int(top), int(left)


def _compared(pictures: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Instant and perceptual, or what comes nearest to them among what there is."""
    decodes = [tier for tier in pictures if tier != ORIGINAL]
    first = INSTANT if INSTANT in decodes else ORIGINAL
    others = [tier for tier in decodes if tier != first] or [ORIGINAL]
    return pictures[first], pictures[PERCEPTUAL if PERCEPTUAL in others else others[0]]
