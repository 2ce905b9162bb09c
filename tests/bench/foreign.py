"""Diffusion decodes of codecs that the decoder was not trained with.

make bench PART=foreign PHOTOS=FOLDER LPIPS=lpips_alex.safetensors MINUTES=5

Trains codecs of several architectures with CompressAI for MINUTES each, encodes held-out
photographs of FOLDER with them, and compares the tier `perceptual`, from which the latents of these
codecs are hidden, with their own pictures. The codecs have N = 64 and M = 128 channels. Their
transforms start from an earlier codec of this repository where the layers are alike, otherwise from
random weights; entropy models always start from random weights.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import checkpoint, image, library
from models.codec import codec, zoo
from models.codec.codec import Codec
from models.diffusion.decoder import Decoder, DiffusionInput
from models.evaluate import bootstrap
from models.evaluate.bootstrap import Statistic
from models.evaluate.metrics import LpipsAlex, mse, psnr
from models.evaluate.niqe import niqe
from models.tiers import TIERS
from models.train import photos
from tests.bench import machine
from tests.support.zoo import CLASSES, parameters

ARCHITECTURES = ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018")
QUALITY = 2
SIZES = (64, 128)
"""Channels N and M."""
LAMBDA = 0.0035 * 255**2
"""Weight of the squared error against bits per pixel: CompressAI's for quality 2."""
START = Path(__file__).parents[2] / f"models/train/weights/msh_n64_q{QUALITY}.safetensors"
PICTURES = 16
assert (settings := TIERS["perceptual"].settings) is not None
PERCEPTUAL = settings
BATCH, CROP = 8, 128


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path, help="folder of photographs; bsds_val_* are held out")
    parser.add_argument("lpips", type=Path, help="weights of LPIPS-Alex")
    parser.add_argument("minutes", type=float, help="minutes of training per architecture")
    options = parser.parse_args()
    files = photos.photographs(options.photos, held_out=False)
    held_out = photos.photographs(options.photos, held_out=True)
    held_out = [file for file in held_out if niqe(_pixels(file)) is not None]
    held_out = held_out[:: max(1, len(held_out) // PICTURES)][:PICTURES]
    training = photos.Photos(files, torch.device("cpu"))
    lpips, own = LpipsAlex(options.lpips), library.load()
    rows = []
    for model in ARCHITECTURES:
        net, steps = train(model, training, options.minutes * 60)
        state = zoo.with_tables(parameters(net))
        row = measure(
            zoo.from_tensors(state, QUALITY, model=model), own.decoder(PERCEPTUAL), held_out, lpips
        )
        rows.append({"model": model, "steps": steps} | row)
    shipped = own.find(QUALITY, "mse")
    row = measure(shipped, own.decoder(PERCEPTUAL), held_out, lpips)
    rows.append({"model": f"shipped {shipped.model}, latents hidden", "steps": 0} | row)
    document = {
        "machine": machine.describe(),
        "minutes": options.minutes,
        "pictures": len(held_out),
        "rows": rows,
    }
    machine.write("foreign", document, _table(document))
    return 0


def train(model: str, training: photos.Photos, seconds: float) -> tuple[Any, int]:
    """Train a network of CompressAI; return it and the number of steps."""
    torch.manual_seed(0)
    net = getattr(import_module("compressai.models"), CLASSES[model])(*SIZES)
    state, start = net.state_dict(), checkpoint.read(START)[0]
    for name in state.keys() & start.keys():
        if name.startswith(("g_", "h_a")) and state[name].shape == start[name].shape:
            state[name].copy_(start[name])
    net.train()
    quantiles = [p for name, p in net.named_parameters() if name.endswith("quantiles")]
    others = [p for name, p in net.named_parameters() if not name.endswith("quantiles")]
    optimiser, auxiliary = torch.optim.Adam(others, 3e-4), torch.optim.Adam(quantiles, 2e-2)
    generator = torch.Generator().manual_seed(0)
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        loss = _loss(net, training.batch(BATCH, CROP, 1.5, generator))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimiser.step()
        auxiliary.zero_grad()
        net.aux_loss().backward()
        auxiliary.step()
        steps += 1
    return net.eval(), steps


def _loss(net: Any, x: Tensor) -> Tensor:
    out = net(x)
    bits = sum(-likelihoods.log2().sum() for likelihoods in out["likelihoods"].values())
    error: Tensor = (out["x_hat"] - x).square().mean()
    loss: Tensor = LAMBDA * error + bits / (len(x) * CROP**2)
    return loss


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one picture against its original."""

    psnr: float
    lpips: float
    niqe_gap: float


def measure(codec_: Codec, decoder: Decoder, files: list[Path], lpips: LpipsAlex) -> dict[str, Any]:
    """Encode and decode photographs; return the figures of `instant` and `perceptual`."""
    pairs, bits = [], []
    for file in files:
        pixels = _pixels(file)
        b = codec_.encode(codec.to_tensor(pixels), "compressai", "float")
        bits.append(8 * (len(b.y_string) + len(b.z_string)) / pixels[..., 0].size)
        pairs.append([_figures(drawn, pixels, lpips) for drawn in _decodes(codec_, decoder, b)])
    instant, perceptual = zip(*pairs, strict=True)
    count = len(files)

    def estimate(statistic: Statistic) -> tuple[float, ...]:
        figure = bootstrap.estimate(statistic, count)
        assert figure is not None
        return (figure.value, *(figure.interval or ()))

    def of(figures: tuple[Figures, ...], name: str) -> list[float]:
        return [getattr(figure, name) for figure in figures]

    losses = [a.psnr - b.psnr for a, b in zip(instant, perceptual, strict=True)]
    return {
        "bpp": sum(bits) / count,
        "psnr": sum(of(instant, "psnr")) / count,
        "psnr_loss": estimate(bootstrap.mean(losses)),
        "lpips": [sum(of(figures, "lpips")) / count for figures in (instant, perceptual)],
        "lpips_ratio": estimate(bootstrap.ratio(of(perceptual, "lpips"), of(instant, "lpips"))),
        "niqe_gap": [estimate(bootstrap.mean(of(f, "niqe_gap"))) for f in (instant, perceptual)],
        "worse": sum(b.lpips > a.lpips for a, b in zip(instant, perceptual, strict=True)),
    }


def _decodes(codec_: Codec, decoder: Decoder, b: Any) -> Iterator[image.Pixels]:
    latents, x_hat = codec_.reconstruct(b)
    yield codec.crop_to_pixels(x_hat, b.height, b.width)
    item = DiffusionInput(latents, x_hat, QUALITY, seed=0, latents_visible=False)
    yield codec.crop_to_pixels(decoder.sample_batch([item], PERCEPTUAL), b.height, b.width)


def _pixels(file: Path) -> image.Pixels:
    pixels: image.Pixels = photos.read(file).permute(1, 2, 0).numpy()
    return pixels


def _figures(drawn: image.Pixels, original: image.Pixels, lpips: LpipsAlex) -> Figures:
    a, b = codec.to_tensor(drawn), codec.to_tensor(original)
    first, second = niqe(drawn), niqe(original)
    assert first is not None and second is not None
    return Figures(psnr(mse(a, b)), lpips(a, b), abs(first - second))


def _table(document: dict[str, Any]) -> str:
    head = [
        "codec", "steps", "bpp", "PSNR", "LPIPS", "`perceptual`", "ratio", "NIQE gap",
        "`perceptual`", "PSNR loss", "pictures with a larger LPIPS",
    ]  # fmt: skip
    lines = [
        "# `perceptual` with codecs that the decoder was not trained with\n",
        ", ".join(f"{k} {v}" for k, v in document["machine"].items()) + "\n",
        f"{document['pictures']} held-out photographs; each codec was trained for "
        f"{document['minutes']:g} minutes "
        "(`tests/bench/foreign.py`). Brackets: 95 % intervals over pictures. NIQE gap: distance to "
        "the original's NIQE.\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for r in document["rows"]:
        cells = [
            r["model"], str(r["steps"] or "–"), f"{r['bpp']:.3f}", f"{r['psnr']:.2f}",
            f"{r['lpips'][0]:.3f}", f"{r['lpips'][1]:.3f}", _interval(r["lpips_ratio"]),
            *map(_interval, r["niqe_gap"]), _interval(r["psnr_loss"]), str(r["worse"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(figure: tuple[float, ...]) -> str:
    value, *bounds = figure
    return f"{value:.2f} [{', '.join(f'{b:.2f}' for b in bounds)}]" if bounds else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
