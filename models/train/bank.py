"""Photographs encoded once, so that a training step runs no codec.

One safetensors file per photograph and quality: `x`, `x_hat` (3, H, W) uint8, `y_hat` (M, H/16,
W/16) float16, `bits` (H/16, W/16) float16; about 10 bytes a pixel. Whole photographs are encoded,
with their borders to the right and below, and only positions without padding are kept: crops on the
16-pixel grid then look like the inside of a real decode.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from models import zoo
from models.bitstream import padded
from models.codec import Codec
from models.msh import STRIDE_Y

HELD_OUT = "bsds_val_"
"""Photographs of this prefix choose between weights; no trainer reads them."""


def photographs(folder: Path, held_out: bool) -> list[Path]:
    """JPEG and PNG files of `folder`, sorted: either the held-out ones or all others."""
    files = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    return [p for p in files if p.name.startswith(HELD_OUT) == held_out]


@torch.inference_mode()
def encode(codec: Codec, x: Tensor) -> dict[str, Tensor]:
    """`x` (3, H, W) uint8, sides multiples of 16 -> the tensors of one bank file."""
    height, width = x.shape[1:]
    full = padded(height, width)
    picture = F.pad(
        x[None].float() / 255, (0, full[1] - width, 0, full[0] - height), mode="replicate"
    )
    *_, latents = codec.hyperprior.encode(picture, "exact")
    x_hat = codec.synthesis(latents.y_hat)[0, :, :height, :width]
    rows, columns = height // STRIDE_Y, width // STRIDE_Y
    return {
        "x": x,
        "x_hat": (x_hat * 255).round().to(torch.uint8).contiguous(),
        "y_hat": latents.y_hat[0, :, :rows, :columns].half().contiguous(),
        "bits": torch.from_numpy(latents.bits[:rows, :columns].copy()).half(),
    }


def build(files: list[Path], out: Path, quality: int) -> None:
    """Encode `files` at `quality` into `out`; what is there already stays as it is."""
    out.mkdir(parents=True, exist_ok=True)
    todo = [p for p in files if not (out / f"{p.stem}.safetensors").exists()]
    if not todo:
        return
    codec = zoo.load(quality)
    for path in tqdm(todo, desc=f"encode at quality {quality}", unit="photo"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = (side // STRIDE_Y * STRIDE_Y for side in pixels.shape[:2])
        x = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1).contiguous()
        part = out / f"{path.stem}.{os.getpid()}.part"
        save_file(encode(codec, x), part)
        os.replace(part, out / f"{path.stem}.safetensors")


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops: `x`, `x_hat` (B, 3, s, s) in [0, 1], `y_hat` (B, M, s/16, s/16), `bits` (B, 1, s/16,
    s/16), `quality` (B,)."""

    x: Tensor
    x_hat: Tensor
    y_hat: Tensor
    bits: Tensor
    quality: Tensor


class Bank:
    """All files of some folders `q1`, `q2`, `q3` in memory; `batch` cuts random crops from them."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.items: list[tuple[int, dict[str, Tensor]]] = []
        for sub in sorted(folder.glob("q[1-8]")):
            files = sorted(sub.glob("*.safetensors"))[:limit]
            self.items += [(int(sub.name[1:]), load_file(f)) for f in files]
        if not self.items:
            raise FileNotFoundError(f"{folder}: no encoded photographs in q1, q2 or q3")
        self.pixels = torch.tensor([float(t["x"][0].numel()) for _, t in self.items])
        self.sides = torch.tensor([min(t["x"].shape[1:]) for _, t in self.items])

    def batch(self, n: int, size: int, generator: torch.Generator) -> Batch:
        """`n` crops of `size` pixels (a multiple of 16), photographs drawn by their pixels."""
        weights = self.pixels * (self.sides >= size)
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        cuts = [self._cut(int(i), size, generator) for i in which]
        x, x_hat, y_hat, bits = (torch.stack([c[k] for c in cuts]) for k in range(4))
        quality = torch.tensor([self.items[int(i)][0] for i in which])
        return Batch(x.float() / 255, x_hat.float() / 255, y_hat.float(), bits.float(), quality)

    def _cut(self, i: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        t = self.items[i][1]
        rows, columns = t["bits"].shape
        s = size // STRIDE_Y
        r = int(torch.randint(rows - s + 1, (), generator=generator))
        c = int(torch.randint(columns - s + 1, (), generator=generator))
        y, x = r * STRIDE_Y, c * STRIDE_Y
        fine = (slice(None), slice(y, y + size), slice(x, x + size))
        coarse = (slice(None), slice(r, r + s), slice(c, c + s))
        return t["x"][fine], t["x_hat"][fine], t["y_hat"][coarse], t["bits"][None][coarse]
