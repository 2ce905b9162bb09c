"""Encode a picture at one quality, decode the real bytes at each tier, measure the decodes."""

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
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
from models.evaluate.decode_cache import CachedDecode, DecodeCache, DecodeKey, code_digest
from models.evaluate.dists import Dists
from models.evaluate.metrics import LpipsAlex, LpipsMetric
from models.evaluate.niqe import niqe
from models.evaluate.nlpd import nlpd
from models.tiers import TIERS, Settings, decoder_for

SHUFFLED = "shuffled"
"""A control experiment, not a tier: `perceptual`, with the latents moved to random positions."""
ORIGINAL, INSTANT, PERCEPTUAL = "original", "instant", "perceptual"
NAMES = (*TIERS, SHUFFLED)
"""Choices of `--tiers`, in the order of the report."""


@dataclass(frozen=True, slots=True)
class DecodeMetrics:
    """Metrics of one decoded picture, against the original unless a comment says otherwise.

    None: the picture is too small for the metric, or its weights are missing.
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
    niqe: float | None  # of the decoded picture
    niqe_original: float | None  # of the original
    offset: float  # largest difference of the channels' means, in 1/255
    shift: float | None  # like `offset`, but against the codec's picture
    seeds_mse: float  # MSE against the picture that was drawn with the first seed
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Networks:
    """Metrics that need weights."""

    lpips: LpipsAlex
    lpips_vgg: LpipsMetric | None = None
    dists: Dists | None = None


@dataclass(frozen=True, slots=True)
class PictureResult:
    """All decodes of one picture at one quality."""

    rows: list[DecodeMetrics]
    pictures: dict[str, Tensor]  # "original", then tier -> first seed; (1, 3, H, W), 8-bit values
    calibration: list[calibration.Point]  # empty if it is too small or has no diffusion tier


@dataclass(frozen=True, slots=True)
class _EncodedPicture:
    """One picture, its bitstream and the codec's decode, shared by all tiers."""

    name: str
    x: Tensor
    digest: str  # of the bitstream
    bpp: float
    niqe: float | None
    latents: Latents
    x_hat: Tensor  # the codec's picture, still padded
    x_hat_digest: str
    instant: Tensor  # `x_hat`, cropped and rounded to 8 bits
    seconds: float  # from bytes to the instant picture


def compare(picture: Tensor, x: Tensor, networks: Networks) -> dict[str, Any]:
    """Fields of `DecodeMetrics` that depend only on `picture` and the original `x`."""
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
    """Evaluation of one codec, that is of one quality, with diffusion decoders.

    `decoders` are chosen by `tiers.decoder_for`.
    """

    def __init__(
        self, codec_: Codec, decoders: Mapping[int, Decoder], networks: Networks, cache: DecodeCache
    ) -> None:
        self.codec, self.decoders, self.networks, self.cache = codec_, decoders, networks, cache
        # compile the synthesis now, so that no picture's time includes it
        grey = codec_.encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
        codec_.synthesis(codec_.latents(grey).y_hat)

    def measure(self, path: Path, tiers: Sequence[str], seeds: Sequence[int]) -> PictureResult:
        """Measure `instant`, `tiers` and every cached decode of the picture in `path`.

        Adds the baselines if `perceptual` is among them. Raises `AfterimageError` with the file's
        name if the picture is unreadable or too small.
        """
        source = self._encode(path)
        wanted = [
            (name, seed)
            for name in (INSTANT, *tiers)
            for seed in (seeds if _settings(name) else (0,))
        ]
        cached = self._cached(source)
        keys = sorted({*wanted, *cached}, key=lambda key: (NAMES.index(key[0]), key[1]))
        points = self._calibration(source) if any(_settings(name) for name, _ in keys) else []
        result = PictureResult([], {ORIGINAL: source.x}, points)
        for key in keys:
            decode = cached.get(key) or self._decode(source, key)
            picture = codec.to_tensor(decode.pixels)
            self._add(result, source, key, picture, decode.seconds + source.seconds)
        if PERCEPTUAL in result.pictures:
            target = metrics.mse(result.pictures[PERCEPTUAL], source.x)
            for name in baselines.NAMES:
                picture = baselines.baseline(name, source.instant, source.x, target)
                self._add(result, source, (name, 0), picture, source.seconds)
        return result

    def _cached(self, source: _EncodedPicture) -> dict[DecodeKey, CachedDecode]:
        """Cached decodes whose origin is unchanged."""
        out = {}
        for key in self.cache.keys(self.codec.quality, source.name):
            if key[0] in NAMES:
                origin = self._origin(source, key)
                if decode := self.cache.get(self.codec.quality, source.name, key, origin):
                    out[key] = decode
        return out

    def _encode(self, path: Path) -> _EncodedPicture:
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
        return _EncodedPicture(
            name=path.name,
            x=x,
            digest=bitstream.digest(data),
            bpp=8 * len(data) / (height * width),
            niqe=niqe(pixels),
            latents=latents,
            x_hat=x_hat,
            x_hat_digest=hashlib.sha256(x_hat.numpy().tobytes()).hexdigest()[:16],
            instant=codec.to_tensor(codec.crop_to_pixels(x_hat, height, width)),
            seconds=seconds,
        )

    def _decode(self, source: _EncodedPicture, key: DecodeKey) -> CachedDecode:
        """Draw and cache a picture; for `instant`, return the codec's picture."""
        name, seed = key
        if (settings := _settings(name)) is None:
            return CachedDecode(codec.to_pixels(source.instant), 0.0)
        latents = _shuffled(source.latents) if name == SHUFFLED else source.latents
        quality = self.codec.quality
        began = time.perf_counter()
        decoder_ = decoder_for(self.decoders, settings)
        visible = self._sees_latents(decoder_)
        x = decoder_.sample(latents, source.x_hat, quality, settings, seed, latents_visible=visible)
        pixels = codec.crop_to_pixels(x, *source.x.shape[2:])
        decode = CachedDecode(pixels, time.perf_counter() - began)
        self.cache.put(quality, source.name, key, self._origin(source, key), decode)
        return decode

    def _origin(self, source: _EncodedPicture, key: DecodeKey) -> str:
        """Text that names everything on which a drawn picture depends."""
        name, seed = key
        settings = _settings(name)
        drawn = f"{name} {settings} seed {seed}"
        if settings is not None:
            decoder_ = decoder_for(self.decoders, settings)
            visible = "shown" if self._sees_latents(decoder_) else "hidden"
            computed = f"{decoder_.device.type} {'bf16' if decoder_.bf16 else 'f32'}"
            drawn += f" {visible} {decoder_.weights_id} {computed} {_code()}"
        return f"{source.digest} {source.x_hat_digest} {drawn}"

    def _sees_latents(self, decoder_: Decoder) -> bool:
        return decoder_.codecs is None or self.codec.weights_id in decoder_.codecs

    def _calibration(self, source: _EncodedPicture) -> list[calibration.Point]:
        decoder_ = self.decoders[0]
        visible = self._sees_latents(decoder_)
        whole = DiffusionInput(source.latents, source.x_hat, self.codec.quality, 0, visible)
        if (centre := calibration.middle(whole, source.x)) is None:
            return []
        item, x = centre
        steps = decoder_.process.steps(calibration.POINTS)[1:]
        generator = torch.Generator().manual_seed(0)
        x0 = decoder_.target(item, x)
        return calibration.curve(decoder_.denoiser(item), x0, steps, generator)

    def _add(
        self,
        result: PictureResult,
        source: _EncodedPicture,
        key: DecodeKey,
        picture: Tensor,
        seconds: float,
    ) -> None:
        tier, seed = key
        first = result.pictures.setdefault(tier, picture)
        row = DecodeMetrics(
            **compare(picture, source.x, self.networks),
            picture=source.name,
            quality=self.codec.quality,
            tier=tier,
            seed=seed,
            bpp=source.bpp,
            niqe_original=source.niqe,
            shift=metrics.offset(picture, source.instant),
            seeds_mse=metrics.mse(picture, first),
            seconds=seconds,
        )
        result.rows.append(row)


@functools.cache
def _code() -> str:
    """Digest of the modules that a drawn picture depends on."""
    modules = (
        blocks, codec, conditioner, decoder, noise, realism, sampler, schedule, tiles, unet
    )  # fmt: skip
    digests = (code_digest(Path(str(module.__file__)).read_text("utf-8")) for module in modules)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _settings(name: str) -> Settings | None:
    """Sampler settings of a tier or control; None for `instant`."""
    return TIERS[PERCEPTUAL if name == SHUFFLED else name].settings


def _shuffled(latents: Latents) -> Latents:
    """Move every latent vector to a random other position; keep the bit map."""
    height, width = latents.y_hat.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    y_hat = latents.y_hat.flatten(2)[:, :, order].reshape(latents.y_hat.shape)
    return replace(latents, y_hat=y_hat)
