"""Photographs encoded once, so that a training step runs no codec.

On disk, one safetensors file per photograph, quality and variant: `x`, `x_hat` (3, H, W) uint8,
`y_hat` (M, H/16, W/16) float16, `bits` (H/16, W/16) float16; about 8 bytes a pixel. Or, on a GPU,
encoded at the start of a run and kept there. Whole photographs are encoded, with their borders to
the right and below, and only positions without padding are kept: crops on the 16-pixel grid then
look like the inside of a real decode.
"""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import PictureError, WeightsError
from models.files import atomic_write
from models.geometry import STRIDE_Y
from models.train.encoder import Encoder
from models.train.photos import Draw, Ragged, open_picture, reduced

SCALES = (1.0, 0.8, 0.65)
"""By which a variant may be reduced: finer texture per pixel than the photograph has."""


SMALLEST = 4
"""Positions along the shorter side of what is encoded: 64 pixels."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to show a photograph to the codec. The first of each photograph is itself."""

    path: Path
    quality: int
    number: int

    @property
    def _turn(self) -> tuple[float, bool, bool]:
        """Scale, flip, transpose: always the same for the same variant."""
        if not self.number:
            return 1.0, False, False
        own = random.Random(f"{self.path.stem}/{self.quality}/{self.number}")
        return own.choice(SCALES), own.random() < 0.5, own.random() < 0.5

    @property
    def name(self) -> str:
        """Of its file in a bank."""
        suffix = f".v{self.number}" if self.number else ""
        return f"{self.path.stem}{suffix}.safetensors"

    def positions(self) -> tuple[int, int]:
        """Rows and columns of its latents, known without reading the pixels."""
        scale, _, transpose = self._turn
        with Image.open(self.path) as picture:
            columns, rows = (side // STRIDE_Y for side in reduced(picture.size, scale))
        return (columns, rows) if transpose else (rows, columns)

    def pixels(self) -> Tensor:
        """(3, H, W) uint8, sides cut to multiples of 16."""
        scale, flip, transpose = self._turn
        rgb = open_picture(self.path, scale)
        height, width = (side // STRIDE_Y * STRIDE_Y for side in (rgb.height, rgb.width))
        x = torch.from_numpy(np.asarray(rgb)[:height, :width].copy()).permute(2, 0, 1)
        x = x.flip(2) if flip else x
        return (x.transpose(1, 2) if transpose else x).contiguous()


def build(
    files: Sequence[Path],
    out: Path,
    quality: int,
    codecs: Path | None = None,
    variants: int = 1,
    device: torch.device | None = None,
) -> None:
    """Encode `files` at `quality` into `out`; what is there already, by this codec, stays as it is.

    Raises `PictureError` where two photographs have one name, but for folder and suffix.
    """
    out.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Variant] = {}
    for variant in _variants(files, (quality,), variants):
        other = wanted.setdefault(variant.name, variant)
        if other.path != variant.path:
            raise PictureError(f"{other.path} and {variant.path}: one name for two photographs")
    encoder = Encoder.load(quality, codecs, device or torch.device("cpu"))
    todo = [v for v in wanted.values() if _codec_of(out / v.name) != encoder.weights_id]
    for variant in _told(todo):
        own = {k: v.cpu().contiguous() for k, v in encoder(variant.pixels()).items()}
        with atomic_write(out / variant.name) as part:
            save_file(own | {"bits": own["bits"][0]}, part, {"codec": encoder.weights_id})


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops: `x`, `x_hat` (B, 3, s, s) in [0, 1], `y_hat` (B, M, s/16, s/16), `bits` (B, 1, s/16,
    s/16), `quality` (B,)."""

    x: Tensor
    x_hat: Tensor
    y_hat: Tensor
    bits: Tensor
    quality: Tensor

    def rows(self, rows: slice) -> "Batch":
        """Some of the crops."""
        return Batch(*(getattr(self, k)[rows] for k in Batch.__slots__))


class Bank:
    """Encoded photographs on the device; `batch` cuts random crops from them, there."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        encoded: Iterable[tuple[int, dict[str, Tensor]]],
        device: torch.device,
    ) -> None:
        """`sizes` are rows and columns of the latents of what `encoded` yields with its quality."""
        fine = [(h * STRIDE_Y, w * STRIDE_Y) for h, w in sizes]
        self.draw = Draw(sizes, device)
        self.fields: dict[str, Ragged] = {}
        self.quality_of: list[int] = []
        for i, (quality, tensors) in enumerate(encoded):
            for name, value in tensors.items():
                if name not in self.fields:
                    grid = fine if value.dtype == torch.uint8 else sizes
                    self.fields[name] = Ragged(grid, value.shape[0], value.dtype, device)
                self.fields[name].put(i, value)
            self.quality_of.append(quality)
        self.qualities = torch.tensor(self.quality_of, device=device)

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "Bank":
        """All files of `q1`, `q2`, … in `folder`; `FileNotFoundError` where there is none.

        `WeightsError` where those of one quality were encoded by several codecs.
        """
        files = [(int(f.parent.name[1:]), f) for f in sorted(folder.glob("q[1-8]/*.safetensors"))]
        if not files:
            raise FileNotFoundError(f"{folder}: no encoded photographs in q1, q2, …")
        if len({(quality, _codec_of(f)) for quality, f in files}) > len({q for q, _ in files}):
            raise WeightsError(f"{folder}: encoded by several codecs of one quality")
        return cls([_positions(f) for _, f in files], _entries(files), device)

    @classmethod
    def encode(
        cls,
        files: Sequence[Path],
        qualities: Sequence[int],
        codecs: Path | None,
        variants: int,
        device: torch.device,
    ) -> "Bank":
        """Photographs at all `qualities`, in device memory; one codec at a time is held there."""
        wanted = _variants(files, qualities, variants)
        encoded = ((v.quality, tensors) for v, tensors in _encoded(wanted, codecs, device))
        return cls([v.positions() for v in wanted], encoded, device)

    @property
    def latents(self) -> int:
        """M."""
        return self.fields["y_hat"].flat.shape[1]

    def batch(self, n: int, size: int, generator: torch.Generator) -> Batch:
        """`n` crops of `size` pixels (a multiple of 16), photographs drawn by their pixels."""
        which, row, column = self.draw.corners(n, size // STRIDE_Y, generator)
        fine = (which, row * STRIDE_Y, column * STRIDE_Y, size)
        coarse = (which, row, column, size // STRIDE_Y)
        return Batch(
            self.fields["x"].crops(*fine).float() / 255,
            self.fields["x_hat"].crops(*fine).float() / 255,
            self.fields["y_hat"].crops(*coarse).float(),
            self.fields["bits"].crops(*coarse).float(),
            self.qualities[which],
        )


def _codec_of(file: Path) -> str | None:
    """The weights id of the codec that made a bank's file; None where there is none."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as f:
        return (f.metadata() or {}).get("codec")


def _positions(file: Path) -> tuple[int, int]:
    with safe_open(file, "pt") as f:
        rows, columns = f.get_slice("bits").get_shape()
        return rows, columns


def _entries(files: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for quality, file in files:
        with safe_open(file, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        yield quality, tensors | {"bits": tensors["bits"][None]}


def _variants(files: Sequence[Path], qualities: Sequence[int], n: int) -> list[Variant]:
    """By quality, so that one codec at a time is held; without what is too small for any crop."""
    every = (Variant(path, q, i) for q in qualities for i in range(n) for path in files)
    return [v for v in every if min(v.positions()) >= SMALLEST]


def _encoded(
    wanted: Sequence[Variant], codecs: Path | None, device: torch.device
) -> Iterator[tuple[Variant, dict[str, Tensor]]]:
    encoder: Encoder | None = None
    quality = 0
    for variant in _told(wanted):
        if encoder is None or quality != variant.quality:
            quality = variant.quality
            encoder = Encoder.load(quality, codecs, device)
        yield variant, encoder(variant.pixels())


def _told(wanted: Sequence[Variant]) -> Iterator[Variant]:
    """Each in turn; how many are done is told now and then."""
    for done, variant in enumerate(wanted, 1):
        yield variant
        if done % 100 == 0 or done == len(wanted):
            sys.stderr.write(f"{done} of {len(wanted)} encoded\n")
