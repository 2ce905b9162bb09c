"""Encode pictures, decode them from the real bytes at each tier, and write a table.

python -m models.evaluate --pictures KODAK --lpips lpips_alex.safetensors --out FOLDER
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models import bitstream, codec, decoder, image, zoo
from models.codec import Codec
from models.decoder import Decoder
from models.evaluate.metrics import LpipsAlex, mse, offset
from models.hyperprior import Latents
from models.tiers import TIERS, Settings

SHUFFLED = "shuffled"
"""A control, not a tier: `perceptual` with latents from other places."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one decoded picture, against the original but for `shift` and `seeds_mse`."""

    picture: str
    quality: int
    tier: str
    seed: int
    bpp: float
    mse: float
    lpips: float
    offset: float  # largest difference of the channels' means, in 1/255
    shift: float  # the same against the codec's picture
    seeds_mse: float  # MSE to the picture of the first seed
    seconds: float


class Evaluation:
    """One pass over pictures at one quality."""

    def __init__(self, own: Codec, drawing: Decoder, lpips: LpipsAlex) -> None:
        self.codec, self.decoder, self.lpips = own, drawing, lpips

    def rows(self, path: Path, tiers: Sequence[str], seeds: Sequence[int]) -> list[Row]:
        """All figures of the picture in `path`."""
        pixels = image.read(path.read_bytes(), bitstream.MAX_PIXELS)
        x = codec.to_tensor(pixels)
        data = bitstream.serialize(self.codec.encode(x, "msh", "exact"))
        b = bitstream.parse(data)
        height, width = pixels.shape[:2]
        bpp = 8 * len(data) / (height * width)
        began = time.perf_counter()
        latents = self.codec.latents(b)
        x_hat = self.codec.synthesis(latents.y_hat)
        instant_s = time.perf_counter() - began

        def rounded(picture: Tensor) -> Tensor:
            cropped = codec.crop(picture, height, width)
            return codec.to_tensor(codec.to_pixels(cropped))

        msh = rounded(x_hat)
        out = []
        for name in tiers:
            settings = TIERS["perceptual" if name == SHUFFLED else name].settings
            first: Tensor | None = None
            for seed in seeds if settings else (0,):
                began = time.perf_counter()
                picture = msh
                if settings:
                    given = _shuffled(latents) if name == SHUFFLED else latents
                    picture = rounded(self._draw(given, x_hat, settings, seed))
                seconds = instant_s + (time.perf_counter() - began if settings else 0)
                first = picture if first is None else first
                row = Row(
                    picture=path.stem,
                    quality=self.codec.quality,
                    tier=name,
                    seed=seed,
                    bpp=bpp,
                    mse=mse(picture, x),
                    lpips=self.lpips(picture, x),
                    offset=offset(picture, x),
                    shift=offset(picture, msh),
                    seeds_mse=mse(picture, first),
                    seconds=seconds,
                )
                out.append(row)
        return out

    def _draw(self, latents: Latents, x_hat: Tensor, settings: Settings, seed: int) -> Tensor:
        return self.decoder.sample(latents, x_hat, self.codec.quality, settings, seed)


def _shuffled(latents: Latents) -> Latents:
    """The same latents, each at a random other position; the bit map stays."""
    height, width = latents.y_hat.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    y_hat = latents.y_hat.flatten(2)[:, :, order].reshape(latents.y_hat.shape)
    return replace(latents, y_hat=y_hat)


def psnr(value: float) -> float:
    """Mean squared error in [0, 1]² -> dB."""
    return -10 * math.log10(value) if value else math.inf


def summary(rows: Sequence[Row]) -> list[dict[str, float | str]]:
    """Means over pictures and seeds per quality and tier; PSNR is the mean of the pictures'."""
    out: list[dict[str, float | str]] = []
    for quality, tier in dict.fromkeys((r.quality, r.tier) for r in rows):
        own = [r for r in rows if (r.quality, r.tier) == (quality, tier)]
        msh = {r.picture: r for r in rows if (r.quality, r.tier) == (quality, "instant")}
        others = [r for r in own if r.seed != own[0].seed]
        line: dict[str, float | str] = {
            "quality": quality,
            "tier": tier,
            "pictures": len({r.picture for r in own}),
            "bpp": _mean([r.bpp for r in own]),
            "psnr": _mean([psnr(r.mse) for r in own]),
            "lpips": _mean([r.lpips for r in own]),
            "offset": _mean([r.offset for r in own]),
            "offset_max": max(r.offset for r in own),
            "shift_max": max(r.shift for r in own),
            "seconds": _mean([r.seconds for r in own]),
        }
        if msh:
            base = _mean([m.lpips for m in msh.values()])
            line["lpips_ratio"] = _mean([r.lpips for r in own]) / base
            line["psnr_loss"] = _mean([psnr(msh[r.picture].mse) - psnr(r.mse) for r in own])
            line["worse_lpips"] = sum(r.lpips > msh[r.picture].lpips for r in own)
            if others:
                line["seeds_ratio"] = _mean([r.seeds_mse / msh[r.picture].mse for r in others])
        out.append(line)
    return out


def table(lines: Sequence[Mapping[str, float | str]]) -> str:
    """A Markdown table."""
    columns = list(dict.fromkeys(k for line in lines for k in line))
    out = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for line in lines:
        cells = [line.get(k, "") for k in columns]
        texts = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        out.append("| " + " | ".join(texts) + " |")
    return "\n".join(out) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lpips", type=Path, help="safetensors of LPIPS-Alex; else downloaded")
    parser.add_argument("--qualities", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--tiers", nargs="+", choices=[*TIERS, SHUFFLED], default=["instant", "perceptual"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    args = parser.parse_args()

    files = sorted(p for p in args.pictures.iterdir() if p.suffix in {".png", ".jpg"})
    files = files[: args.limit]
    lpips, drawing = LpipsAlex(args.lpips), decoder.load()
    rows: list[Row] = []
    with tqdm(total=len(files) * len(args.qualities), unit="picture") as bar:
        for quality in args.qualities:
            evaluation = Evaluation(zoo.load(quality), drawing, lpips)
            for path in files:
                rows += evaluation.rows(path, args.tiers, args.seeds)
                bar.update()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = summary(rows)
    document = {"decoder": drawing.weights_id, "summary": lines, "rows": [asdict(r) for r in rows]}
    (args.out / "evaluation.json").write_text(json.dumps(document, indent=1))
    (args.out / "evaluation.md").write_text(table(lines))
    print(table(lines))  # noqa: T201


if __name__ == "__main__":
    main()
