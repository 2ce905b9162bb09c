"""One picture at one quality: encoded, decoded from the real bytes at each tier, measured."""

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import geometry, image, tiles
from models.codec import bitstream, codec
from models.codec.codec import Codec
from models.codec.hyperprior import Latents
from models.diffusion import blocks, conditioner, decoder, noise, realism, sampler, schedule, unet
from models.diffusion.decoder import Decoder, DiffusionInput
from models.errors import AfterimageError, PictureError
from models.evaluate import baselines, calibration, metrics
from models.evaluate.decode_cache import Decode, Draw, Kept, code_digest
from models.evaluate.dists import Dists
from models.evaluate.metrics import Lpips, LpipsAlex
from models.evaluate.niqe import niqe
from models.evaluate.nlpd import nlpd
from models.tiers import TIERS, Settings

SHUFFLED = "shuffled"
"""A control, not a tier: `perceptual` with latents from other places."""
ORIGINAL, INSTANT, PERCEPTUAL = "original", "instant", "perceptual"
NAMES = (*TIERS, SHUFFLED)
"""What can be asked for, in the order in which it is reported."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one decoded picture, against the original unless said otherwise.

    None: the picture is too small for the figure, or its weights were not given.
    """

    picture: str
    quality: int
    tier: str
    seed: int
    bpp: float
    mse: float  # of values in [0, 1]
    ms_ssim: float | None
    lpips: float
    lpips_vgg: float | None
    dists: float | None
    nlpd: float
    gmsd: float
    niqe: float | None  # of the picture itself
    niqe_original: float | None  # of the original
    offset: float  # largest difference of the channels' means, in 1/255
    shift: float | None  # the same against the codec's picture
    seeds_mse: float  # MSE to the picture of the first seed
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Networks:
    """Metrics that need weights."""

    lpips: LpipsAlex
    lpips_vgg: Lpips | None = None
    dists: Dists | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of one picture, and what they were measured on: (1, 3, H, W), 8-bit values in [0, 1]."""

    rows: list[Row]
    pictures: dict[str, Tensor]  # "original", then a picture of the first seed per tier
    calibration: list[calibration.Point]  # empty: too small, or nothing is drawn


@dataclass(frozen=True, slots=True)
class _Source:
    """What all decodes of one picture share."""

    name: str
    x: Tensor
    digest: str  # of the bitstream
    bpp: float
    niqe: float | None
    latents: Latents
    x_hat: Tensor  # the codec's picture, still padded
    x_hat_digest: str
    msh: Tensor  # the same, cropped and rounded
    seconds: float  # of the instant picture, from bytes


def compared(picture: Tensor, x: Tensor, networks: Networks) -> dict[str, Any]:
    """The figures of a `Row` that `picture` has against the original `x` and by itself."""
    pixels = codec.to_pixels(picture)
    return {
        "mse": metrics.mse(picture, x),
        "ms_ssim": metrics.ms_ssim(picture, x),
        "lpips": networks.lpips(picture, x),
        "lpips_vgg": networks.lpips_vgg(picture, x) if networks.lpips_vgg else None,
        "dists": networks.dists(picture, x) if networks.dists else None,
        "nlpd": nlpd(codec.to_pixels(x), pixels),
        "gmsd": metrics.gmsd(picture, x),
        "niqe": niqe(pixels),
        "offset": metrics.offset(picture, x),
    }


class Evaluation:
    """One pass over pictures at one quality."""

    def __init__(self, own: Codec, drawing: Decoder, networks: Networks, kept: Kept) -> None:
        self.codec, self.decoder, self.networks, self.kept = own, drawing, networks, kept
        self.shown = drawing.codecs is None or own.weights_id in drawing.codecs
        grey = own.encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
        own.synthesis(own.latents(grey).y_hat)  # compiled now, and not within a picture's time

    def measure(self, path: Path, tiers: Sequence[str], seeds: Sequence[int]) -> Measured:
        """`instant` and `tiers` of the picture in `path`, and whatever else of it was kept.

        Null rows too where `perceptual` is among them. Raises `AfterimageError`, with the file's
        name, where it cannot be read or is too small.
        """
        source = self._source(path)
        asked = [
            (name, seed)
            for name in (INSTANT, *tiers)
            for seed in (seeds if _settings(name) else (0,))
        ]
        kept = self._kept(source)
        draws = sorted({*asked, *kept}, key=lambda draw: (NAMES.index(draw[0]), draw[1]))
        points = self._calibration(source) if any(_settings(name) for name, _ in draws) else []
        out = Measured([], {ORIGINAL: source.x}, points)
        for draw in draws:
            decode = kept.get(draw) or self._decode(source, draw)
            picture = codec.to_tensor(decode.pixels)
            self._add(out, source, draw, picture, decode.seconds + source.seconds)
        if PERCEPTUAL in out.pictures:
            target = metrics.mse(out.pictures[PERCEPTUAL], source.x)
            for name in baselines.NAMES:
                picture = baselines.null(name, source.msh, source.x, target)
                self._add(out, source, (name, 0), picture, source.seconds)
        return out

    def _kept(self, source: _Source) -> dict[Draw, Decode]:
        """What was drawn before from all the same, as `_origin` has it."""
        out = {}
        for draw in self.kept.draws(self.codec.quality, source.name):
            if draw[0] in NAMES:
                origin = self._origin(source, draw)
                if decode := self.kept.get(self.codec.quality, source.name, draw, origin):
                    out[draw] = decode
        return out

    def _source(self, path: Path) -> _Source:
        try:
            pixels = image.read(path.read_bytes(), geometry.MAX_PIXELS)
        except AfterimageError as e:
            raise PictureError(f"{path}: {e}") from e
        height, width = pixels.shape[:2]
        if min(height, width) < metrics.LPIPS_SIDE:
            side = metrics.LPIPS_SIDE
            raise PictureError(f"{path}: {width}x{height}; LPIPS needs sides of {side} or more")
        x = codec.to_tensor(pixels)
        data = bitstream.serialize(self.codec.encode(x, "msh", "exact"))
        began = time.perf_counter()
        latents, x_hat = self.codec.reconstruct(bitstream.parse(data))
        seconds = time.perf_counter() - began
        bpp = 8 * len(data) / (height * width)
        msh = codec.to_tensor(codec.crop_to_pixels(x_hat, height, width))
        return _Source(
            path.name, x, bitstream.digest(data), bpp, niqe(pixels), latents, x_hat,
            hashlib.sha256(x_hat.numpy().tobytes()).hexdigest()[:16], msh, seconds,
        )  # fmt: skip

    def _decode(self, source: _Source, draw: Draw) -> Decode:
        name, seed = draw
        if (settings := _settings(name)) is None:
            return Decode(codec.to_pixels(source.msh), 0.0)
        latents = _shuffled(source.latents) if name == SHUFFLED else source.latents
        quality = self.codec.quality
        began = time.perf_counter()
        drawn = self.decoder.sample(
            latents, source.x_hat, quality, settings, seed, shown=self.shown
        )
        pixels = codec.crop_to_pixels(drawn, *source.x.shape[2:])
        decode = Decode(pixels, time.perf_counter() - began)
        self.kept.put(quality, source.name, draw, self._origin(source, draw), decode)
        return decode

    def _origin(self, source: _Source, draw: Draw) -> str:
        """All that a drawn picture depends on."""
        name, seed = draw
        drawn = f"{name} {_settings(name)} seed {seed} {'shown' if self.shown else 'hidden'}"
        by = f"{self.decoder.weights_id} {self.decoder.device.type} {_code()}"
        return f"{source.digest} {source.x_hat_digest} {drawn} {by}"

    def _calibration(self, source: _Source) -> list[calibration.Point]:
        whole = DiffusionInput(source.latents, source.x_hat, self.codec.quality, 0, self.shown)
        if (part := calibration.middle(whole, source.x)) is None:
            return []
        draft, x = part
        steps = self.decoder.process.steps(calibration.POINTS)[1:]
        generator = torch.Generator().manual_seed(0)
        x0 = self.decoder.target(draft, x)
        return calibration.curve(self.decoder.denoiser(draft), x0, steps, generator)

    def _add(
        self, out: Measured, source: _Source, draw: Draw, picture: Tensor, seconds: float
    ) -> None:
        tier, seed = draw
        first = out.pictures.setdefault(tier, picture)
        row = Row(
            **compared(picture, source.x, self.networks),
            picture=source.name,
            quality=self.codec.quality,
            tier=tier,
            seed=seed,
            bpp=source.bpp,
            niqe_original=source.niqe,
            shift=metrics.offset(picture, source.msh),
            seeds_mse=metrics.mse(picture, first),
            seconds=seconds,
        )
        out.rows.append(row)


@functools.cache
def _code() -> str:
    """Digest of the code that draws. Comments, docstrings and imports do not count."""
    drawing = (
        blocks, codec, conditioner, decoder, noise, realism, sampler, schedule, tiles, unet
    )  # fmt: skip
    sources = (code_digest(Path(str(module.__file__)).read_text("utf-8")) for module in drawing)
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def _settings(name: str) -> Settings | None:
    """None: nothing is drawn."""
    return TIERS[PERCEPTUAL if name == SHUFFLED else name].settings


def _shuffled(latents: Latents) -> Latents:
    """The same latents, each at a random other position; the bit map stays."""
    height, width = latents.y_hat.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    y_hat = latents.y_hat.flatten(2)[:, :, order].reshape(latents.y_hat.shape)
    return replace(latents, y_hat=y_hat)
