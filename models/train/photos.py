"""Photographs in device memory, and random crops of them, cut on the device."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.errors import PictureError

HELD_OUT = "bsds_val_"
"""File names with this prefix are held out: used to compare weights, never to train."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
LONGEST = 2048
"""Longest side in pixels. Larger photographs are reduced, so that each can be encoded whole."""


def photographs(folder: Path, held_out: bool) -> list[Path]:
    """Return the held-out photographs in `folder` and its subfolders, or all others; sorted.

    Raises `FileNotFoundError` if there are none.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]
    chosen = [p for p in files if p.name.startswith(HELD_OUT) == held_out]
    if not chosen:
        kind = f"named {HELD_OUT}*" if held_out else "to train on"
        raise FileNotFoundError(f"{folder}: no photographs {kind}")
    return chosen


def open_picture(path: Path, scale: float = 1.0) -> Image.Image:
    """Open a picture as RGB, resized to its `reduced` size. Raises `PictureError` if unreadable."""
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except OSError as e:
        raise PictureError(f"{path}: {e}") from e
    size = reduced(rgb.size, scale)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)


def reduced(size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Return `size` reduced to at most `LONGEST` pixels per side, then scaled by `scale`."""
    scale *= min(1.0, LONGEST / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def read(path: Path) -> Tensor:
    """Read a photograph as a tensor (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(open_picture(path)).copy()).permute(2, 0, 1)


class Ragged:
    """Pictures of different sizes, stored one after another in a flat tensor (positions, C)."""

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
        """Store `picture` (C, H, W), whose size is `sizes[i]`."""
        self.flat[self._slices[i]] = picture.flatten(1).T.to(self.flat.device)

    def get(self, i: int) -> Tensor:
        """Return picture `i`, (C, H, W)."""
        return self.flat[self._slices[i]].T.reshape(-1, *self._sizes[i])

    def crops(self, which: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
        """Cut crops: picture indices and corners (B,) -> (B, C, size, size), channels last."""
        columns = self.columns[which]
        r = torch.arange(size, device=self.flat.device)
        corner = self.starts[which] + top * columns + left
        index = corner[:, None, None] + r[None, :, None] * columns[:, None, None] + r
        return self.flat[index].permute(0, 3, 1, 2)


class CropSampler:
    """Draws random pictures, with probability by area, and random corners of crops in them.

    `sizes` and crops are measured in the same unit: pixels or positions of the latents.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.shortest = [min(size) for size in sizes]

    def corners(self, n: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw `n` crops of `size` -> picture index, top row and left column, each (n,).

        Raises `ValueError` if no picture is as large as the crop.
        """
        if max(self.shortest) < size:
            raise ValueError(f"no picture is as large as a crop of {size}; use smaller crops")
        large = self.sizes.amin(1) >= size
        ends = (self.sizes.prod(1) * large).double().cumsum(0)
        device = self.sizes.device
        uniform = torch.rand(3, n, generator=generator, device=device, dtype=torch.float64)
        which = torch.searchsorted(ends, uniform[0] * ends[-1], right=True)
        room = self.sizes[which] - size + 1
        top, left = ((uniform[1 + i] * room[:, i]).long() for i in range(2))
        return which, top, left


class Photos:
    """Photographs for training the codec. `batch` cuts augmented crops from them."""

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        pictures = [read(p) for p in files]
        sizes = [(p.shape[1], p.shape[2]) for p in pictures]
        self.pixels = Ragged(sizes, 3, torch.uint8, device)
        for i, picture in enumerate(pictures):
            self.pixels.put(i, picture)
        self.sampler = CropSampler(sizes, device)

    def batch(self, n: int, size: int, reach: float, generator: torch.Generator) -> Tensor:
        """Return random crops (n, 3, size, size) in [0, 1].

        Half of them are cut with sides of `reach` times `size` (`reach` >= 1) and reduced to
        `size`. `reach` is limited so that at least a tenth of the photographs is large enough. Half
        of the crops are mirrored, and independently half are transposed.
        """
        large = sorted(self.sampler.shortest)[-max(1, len(self.sampler.shortest) // 10)]
        outer = max(size, min(round(size * reach), large))
        k = n // 2 if outer > size else 0
        x = self._cut(n - k, size, generator)
        if k:
            cut = self._cut(k, outer, generator)
            x = torch.cat([x, F.interpolate(cut, (size, size), mode="bilinear", antialias=True)])
        flips = torch.rand(2, n, 1, 1, 1, generator=generator, device=x.device) < 0.5
        x = torch.where(flips[0], x.flip(3), x)
        x = torch.where(flips[1], x.transpose(2, 3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def _cut(self, n: int, size: int, generator: torch.Generator) -> Tensor:
        which, top, left = self.sampler.corners(n, size, generator)
        return self.pixels.crops(which, top, left, size).float() / 255
