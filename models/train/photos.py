"""Photographs in memory, on the device, cut into crops there: a step costs the host nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.errors import PictureError

HELD_OUT = "bsds_val_"
"""Photographs of this prefix choose between weights; no trainer reads them."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
LONGEST = 2048
"""Pixels; larger photographs are reduced to it, so that each is encoded whole."""


def photographs(folder: Path, held_out: bool) -> list[Path]:
    """Pictures in `folder`, sorted: either the held-out ones or all others.

    Raises `FileNotFoundError` where there is none.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]
    chosen = [p for p in files if p.name.startswith(HELD_OUT) == held_out]
    if not chosen:
        named = f"named {HELD_OUT}*" if held_out else "to train on"
        raise FileNotFoundError(f"{folder}: no photographs {named}")
    return chosen


def open_picture(path: Path, scale: float = 1.0) -> Image.Image:
    """RGB, of `reduced` size. Raises `PictureError`."""
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except OSError as e:
        raise PictureError(f"{path}: {e}") from e
    size = reduced(rgb.size, scale)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)


def reduced(size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """`size` times `scale`, first brought down to `LONGEST`."""
    scale *= min(1.0, LONGEST / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def read(path: Path) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(open_picture(path)).copy()).permute(2, 0, 1)


class Ragged:
    """Pictures of different sizes as rows of one flat tensor (positions, C)."""

    def __init__(
        self, sizes: Sequence[tuple[int, int]], channels: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shapes = np.array(sizes, np.int64).reshape(-1, 2)
        ends = shapes.prod(1).cumsum()
        starts = ends - shapes.prod(1)
        self.flat = torch.empty(int(ends[-1]), channels, dtype=dtype, device=device)
        self.starts = torch.from_numpy(starts).to(device)
        self.columns = torch.from_numpy(shapes[:, 1].copy()).to(device)
        self._slices = [slice(*ends) for ends in zip(starts.tolist(), ends.tolist(), strict=True)]
        self._sizes = list(sizes)

    def put(self, i: int, picture: Tensor) -> None:
        """`picture` (C, H, W) of the size announced for `i`."""
        self.flat[self._slices[i]] = picture.flatten(1).T.to(self.flat.device)

    def get(self, i: int) -> Tensor:
        """(C, H, W)."""
        return self.flat[self._slices[i]].T.reshape(-1, *self._sizes[i])

    def crops(self, which: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
        """Indexes and corners, each (B,) int64 -> (B, C, size, size), channels last."""
        columns = self.columns[which]
        r = torch.arange(size, device=self.flat.device)
        corner = self.starts[which] + top * columns + left
        index = corner[:, None, None] + r[None, :, None] * columns[:, None, None] + r
        return self.flat[index].permute(0, 3, 1, 2)


class Draw:
    """Which pictures, by their size, and where in them; sizes in positions of some grid."""

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.shortest = [min(size) for size in sizes]

    def corners(self, n: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`n` crops -> index, row and column, each (n,); pictures are drawn by their area.

        Raises `ValueError` where no picture is as large as the crop.
        """
        if max(self.shortest) < size:
            raise ValueError(f"no picture is as large as a crop of {size}")
        large = self.sizes.amin(1) >= size
        ends = (self.sizes.prod(1) * large).double().cumsum(0)
        device = self.sizes.device
        uniform = torch.rand(3, n, generator=generator, device=device, dtype=torch.float64)
        which = torch.searchsorted(ends, uniform[0] * ends[-1], right=True)
        room = self.sizes[which] - size + 1
        top, left = ((uniform[1 + i] * room[:, i]).long() for i in range(2))
        return which, top, left


class Photos:
    """The training photographs of a folder, for the codec: crops in [0, 1]."""

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        pictures = [read(p) for p in files]
        sizes = [(p.shape[1], p.shape[2]) for p in pictures]
        self.pixels = Ragged(sizes, 3, torch.uint8, device)
        for i, picture in enumerate(pictures):
            self.pixels.put(i, picture)
        self.draw = Draw(sizes, device)

    def batch(self, n: int, size: int, reach: float, generator: torch.Generator) -> Tensor:
        """(n, 3, size, size): half of them reduced from cuts `reach` times as large.

        `reach` >= 1 is cut down to what a tenth of the photographs can give. Half of each half is
        mirrored, half transposed.
        """
        large = sorted(self.draw.shortest)[-max(1, len(self.draw.shortest) // 10)]
        outer = max(size, min(round(size * reach), large))
        k = n // 2 if outer > size else 0
        x = self._cut(n - k, size, generator)
        if k:
            cut = self._cut(k, outer, generator)
            x = torch.cat([x, F.interpolate(cut, (size, size), mode="bilinear", antialias=True)])
        turn = torch.rand(2, n, 1, 1, 1, generator=generator, device=x.device) < 0.5
        x = torch.where(turn[0], x.flip(3), x)
        x = torch.where(turn[1], x.transpose(2, 3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def _cut(self, n: int, size: int, generator: torch.Generator) -> Tensor:
        which, top, left = self.draw.corners(n, size, generator)
        return self.pixels.crops(which, top, left, size).float() / 255
