"""Banks: data sets of photographs that the codec has encoded once, before training starts.

Training steps then need not run the codec. A bank on disk has one safetensors file per photograph,
quality and variant: `x`, `x_hat` (3, H, W) uint8, `y_hat` (M, H/16, W/16) float16, `bits`
(H/16, W/16) float16; about 8 bytes per pixel. Without a bank on disk, a run encodes the photographs
at its start and keeps them in device memory. Photographs are encoded whole, padded at the right and
bottom, and only positions without padding are kept, so that crops on the 16-pixel grid look like
parts of a real decode. Files of a codec whose latents are hidden in training have no `y_hat`.
"""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
from models.train.photos import HELD_OUT, CropSampler, Ragged, open_picture, reduced

SCALES = (1.0, 0.8, 0.65)
"""Scales of variants. Scaling a photograph down makes its texture finer."""

SMALLEST = 4
"""Smallest side of an encoded photograph in positions of the latents: 64 pixels."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A photograph to encode: unchanged if `number` is 0, else scaled, flipped or transposed."""

    path: Path
    quality: int
    number: int

    @property
    def _transform(self) -> tuple[float, bool, bool]:
        """Scale, flip and transpose, drawn at random from the name, quality and number as seed."""
        if not self.number:
            return 1.0, False, False
        rng = random.Random(f"{self.path.stem}/{self.quality}/{self.number}")
        return rng.choice(SCALES), rng.random() < 0.5, rng.random() < 0.5

    @property
    def name(self) -> str:
        """Name of its file in a bank."""
        suffix = f".v{self.number}" if self.number else ""
        return f"{self.path.stem}{suffix}.safetensors"

    def positions(self) -> tuple[int, int]:
        """Rows and columns of its latents, computed from the size in the file's header."""
        scale, _, transpose = self._transform
        with Image.open(self.path) as picture:
            columns, rows = (side // STRIDE_Y for side in reduced(picture.size, scale))
        return (columns, rows) if transpose else (rows, columns)

    def pixels(self) -> Tensor:
        """Return the pixels, (3, H, W) uint8, with sides cut to multiples of 16."""
        scale, flip, transpose = self._transform
        rgb = open_picture(self.path, scale)
        height, width = (side // STRIDE_Y * STRIDE_Y for side in (rgb.height, rgb.width))
        x = torch.from_numpy(np.asarray(rgb)[:height, :width].copy()).permute(2, 0, 1)
        x = x.flip(2) if flip else x
        return (x.transpose(1, 2) if transpose else x).contiguous()


class PictureCodec(Protocol):
    """A codec, seen from its pictures."""

    @property
    def weights_id(self) -> str: ...
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`x` (3, H, W) uint8, sides multiples of 16 -> the tensors of one bank entry."""
        ...


def build(
    files: Sequence[Path],
    out: Path,
    quality: int,
    codec: PictureCodec,
    variants: int = 1,
) -> None:
    """Encode `files` at `quality` with `codec` into the folder `out`.

    Files that the same codec wrote earlier are kept. Raises `PictureError` if two photographs have
    the same name, apart from folder and suffix, or if all are smaller than 64 pixels.
    """
    out.mkdir(parents=True, exist_ok=True)
    by_name: dict[str, Variant] = {}
    for variant in _variants(files, (quality,), variants):
        other = by_name.setdefault(variant.name, variant)
        if other.path != variant.path:
            raise PictureError(
                f"{other.path} and {variant.path} would have the same name in the bank; rename one"
            )
    missing = [v for v in by_name.values() if _codec_of(out / v.name) != codec.weights_id]
    for variant in with_progress(missing):
        tensors = {k: v.cpu().contiguous() for k, v in codec(variant.pixels()).items()}
        with atomic_write(out / variant.name) as part:
            save_file(tensors | {"bits": tensors["bits"][0]}, part, {"codec": codec.weights_id})


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of encoded photographs."""

    x: Tensor  # (B, 3, s, s) in [0, 1]: the photograph
    x_hat: Tensor  # (B, 3, s, s) in [0, 1]: the codec's picture
    y_hat: Tensor  # (B, M, s/16, s/16): latents
    bits: Tensor  # (B, 1, s/16, s/16): bits per position
    quality: Tensor  # (B,)

    def rows(self, rows: slice) -> "Batch":
        """Return a slice of the crops."""
        return Batch(*(getattr(self, k)[rows] for k in Batch.__slots__))


class Bank:
    """Encoded photographs in device memory. `batch` cuts random crops from them."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        encoded: Iterable[tuple[int, dict[str, Tensor]]],
        device: torch.device,
    ) -> None:
        """`encoded` yields quality and tensors; `sizes` are (rows, columns) of the latents."""
        fine = [(h * STRIDE_Y, w * STRIDE_Y) for h, w in sizes]
        self.sampler = CropSampler(sizes, device)
        self.fields: dict[str, Ragged] = {}
        self.entry_qualities: list[int] = []
        for i, (quality, tensors) in enumerate(encoded):
            for name, value in tensors.items():
                if name not in self.fields:
                    grid = fine if value.dtype == torch.uint8 else sizes
                    self.fields[name] = Ragged(grid, value.shape[0], value.dtype, device)
                self.fields[name].put(i, value)
            self.entry_qualities.append(quality)
        self.qualities = torch.tensor(self.entry_qualities, device=device)

    @classmethod
    def read(cls, folder: Path, device: torch.device, held_out: bool) -> "Bank":
        """Read all files in the subfolders `q1`, `q2`, … of `folder`.

        Raises `FileNotFoundError` if there are none, `ValueError` if held-out photographs are among
        them and `held_out` is False, and `WeightsError` if the files of a quality were encoded by
        several codecs.
        """
        files = _files(folder, "*.safetensors", held_out)
        if len({(quality, _codec_of(f)) for quality, f in files}) > len({q for q, _ in files}):
            raise WeightsError(
                f"{folder}: one quality was encoded by several codecs; build the bank again"
            )
        return cls([_positions(f) for _, f in files], _entries(files), device)

    @classmethod
    def read_hidden(cls, folder: Path, latents: int, device: torch.device) -> "Bank":
        """Read photographs that any codecs encoded, `q1/CODEC/*`, …, with zeros for latents.

        `latents` is the number of channels. Raises `FileNotFoundError` if there are no files, and
        `ValueError` if held-out photographs are among them.
        """
        files = _files(folder, "*/*.safetensors", held_out=False)
        hidden = (
            (q, tensors | {"y_hat": tensors["bits"].new_zeros(latents, *tensors["bits"].shape[1:])})
            for q, tensors in _entries(files)
        )
        return cls([_positions(f) for _, f in files], hidden, device)

    @classmethod
    def encode(
        cls,
        files: Sequence[Path],
        qualities: Sequence[int],
        codecs: Path | None,
        variants: int,
        device: torch.device,
    ) -> "Bank":
        """Encode photographs at all `qualities` into device memory, loading one codec at a time.

        Raises `PictureError` if all are smaller than 64 pixels.
        """
        entries = _variants(files, qualities, variants)
        encoded = ((v.quality, tensors) for v, tensors in _encoded(entries, codecs, device))
        return cls([v.positions() for v in entries], encoded, device)

    @property
    def latents(self) -> int:
        """Number of latent channels, M."""
        return self.fields["y_hat"].flat.shape[1]

    def batch(self, n: int, size: int, generator: torch.Generator) -> Batch:
        """Draw `n` crops of `size` pixels (a multiple of 16) on the grid of the latents."""
        which, row, column = self.sampler.corners(n, size // STRIDE_Y, generator)
        fine = (which, row * STRIDE_Y, column * STRIDE_Y, size)
        coarse = (which, row, column, size // STRIDE_Y)
        return Batch(
            self.fields["x"].crops(*fine).float() / 255,
            self.fields["x_hat"].crops(*fine).float() / 255,
            self.fields["y_hat"].crops(*coarse).float(),
            self.fields["bits"].crops(*coarse).float(),
            self.qualities[which],
        )


def _files(folder: Path, pattern: str, held_out: bool) -> list[tuple[int, Path]]:
    """Return quality and path of the files that match `pattern` in `q1`, `q2`, … of `folder`.

    Unless `held_out`, raises `ValueError` if there are held-out photographs among them.
    """
    files = [
        (quality, file)
        for quality in range(1, 9)
        for file in sorted((folder / f"q{quality}").glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(f"{folder}: no encoded photographs {pattern} in q1, q2, …")
    for _, file in files:
        if file.name.startswith(HELD_OUT) and not held_out:
            raise ValueError(
                f"{file}: photographs {HELD_OUT}* are never trained on; encode them into a folder "
                "of their own, for --held-out"
            )
    return files


def _codec_of(file: Path) -> str | None:
    """Return the weights id of the codec that encoded a file; None if the file is missing."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as f:
        return (f.metadata() or {}).get("codec")


def _positions(file: Path) -> tuple[int, int]:
    """Return rows and columns of a bank file's latents."""
    with safe_open(file, "pt") as f:
        rows, columns = f.get_slice("bits").get_shape()
        return rows, columns


def _entries(files: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for quality, file in files:
        with safe_open(file, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        yield quality, tensors | {"bits": tensors["bits"][None]}


def _variants(files: Sequence[Path], qualities: Sequence[int], n: int) -> list[Variant]:
    """Return `n` variants per photograph and quality, by quality, except those too small.

    Raises `PictureError` if all are too small.
    """
    every = (Variant(path, q, i) for q in qualities for i in range(n) for path in files)
    variants = [v for v in every if min(v.positions()) >= SMALLEST]
    if not variants:
        raise PictureError(
            f"all {len(files)} photographs have a side below {SMALLEST * STRIDE_Y} pixels"
        )
    return variants


def _encoded(
    variants: Sequence[Variant], codecs: Path | None, device: torch.device
) -> Iterator[tuple[Variant, dict[str, Tensor]]]:
    """Encode `variants`, grouped by quality, with one codec at a time in memory."""
    encoder: Encoder | None = None
    quality = 0
    for variant in with_progress(variants):
        if encoder is None or quality != variant.quality:
            quality = variant.quality
            encoder = Encoder.load(quality, codecs, device)
        yield variant, encoder(variant.pixels())


def with_progress(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Iterate over `variants`; write the number done to stderr after every 100 and at the end."""
    for done, variant in enumerate(variants, 1):
        yield variant
        if done % 100 == 0 or done == len(variants):
            sys.stderr.write(f"{done} of {len(variants)} encoded\n")
