"""A codec: one set of weights that turns pictures into bitstreams and bitstreams into pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import google_crc32c
import torch
import torch.nn.functional as F
from torch import Tensor

from models import geometry
from models.codec import architectures, bitstream
from models.codec.bitstream import Bitstream, Format, Metric, Profile
from models.codec.hyperprior import LatentCoder, Latents
from models.codec.networks import Network
from models.codec.rans import Int32Array
from models.codec.synthesis import Synthesis, to_samples
from models.errors import (
    ChecksumMismatch,
    CorruptStream,
    DesynchronisedStream,
    ParameterError,
    WrongWeights,
)
from models.image import Pixels

Stage = Literal["entropy", "g_s"]
OnStage = Callable[[Stage], None]
"""Called after each stage of decoding: "entropy" is entropy decoding, "g_s" is synthesis."""


def _ignore(stage: Stage) -> None:
    """The default `OnStage`: do nothing."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One set of codec weights, ready to run on the CPU."""

    quality: int
    metric: Metric
    weights_id: str
    net: Network
    latent_coder: LatentCoder
    synthesis: Synthesis
    model: str = architectures.DEFAULT

    def decode(self, b: Bitstream, on_stage: OnStage = _ignore) -> Pixels:
        """Decode a bitstream to the instant picture, (H, W, 3). Raises as `latents` does."""
        y_hat = self.latents(b).y_hat
        on_stage("entropy")
        samples = self.synthesis.samples(y_hat)
        on_stage("g_s")
        return _pixels(crop(samples, b.height, b.width))

    def reconstruct(self, b: Bitstream, on_stage: OnStage = _ignore) -> tuple[Latents, Tensor]:
        """Decode a bitstream to its latents and x_hat, (1, 3, H, W) in [0, 1], still padded.

        Raises as `latents` does.
        """
        latents = self.latents(b)
        on_stage("entropy")
        x_hat = self.synthesis(latents.y_hat)
        on_stage("g_s")
        return latents, x_hat

    def latents(self, b: Bitstream) -> Latents:
        """Entropy-decode a bitstream to its latents.

        Raises `WrongWeights`, `CorruptStream`, `DesynchronisedStream`, `ChecksumMismatch`, or
        `Unavailable` if other arithmetics must be tried and cannot be.
        """
        if b.weights_id and b.weights_id != self.weights_id:
            raise WrongWeights(
                f"the bitstream was encoded with weights {b.weights_id}; "
                f"quality {b.quality} here has {self.weights_id}"
            )
        size = geometry.padded(b.height, b.width)
        try:
            latents = self.latent_coder.decode(b.y_string, b.z_string, size, b.profile)
        except (CorruptStream, DesynchronisedStream) as e:
            raise type(e)(f"{e}{bitstream.other_meanings(b)}") from e
        if b.symbols_crc is not None and _crc(latents.symbols) != b.symbols_crc:
            raise ChecksumMismatch("CRC-32C mismatch: the decoded symbols are not the encoded ones")
        return latents

    def encode(self, x: Tensor, format: Format, profile: Profile) -> Bitstream:
        """Encode `x` (1, 3, H, W) in [0, 1]. CompressAI's format always has the profile `float`.

        Raises `ParameterError` for `.msh` and another model than `mbt2018-mean`.
        """
        if format == "msh" and self.model != architectures.DEFAULT:
            raise ParameterError(
                f".msh files are of {architectures.DEFAULT} only; for {self.model}, choose the "
                "format compressai"
            )
        if format == "compressai":
            profile = "float"
        y_string, z_string, latents = self.latent_coder.encode(pad(x), profile)
        height, width = x.shape[2:]
        is_msh = format == "msh"
        return Bitstream(
            format, profile, self.quality, self.metric, height, width, y_string, z_string,
            weights_id=self.weights_id if is_msh else "",
            symbols_crc=_crc(latents.symbols) if is_msh else None,
            model=self.model,
        )  # fmt: skip


def pad(x: Tensor) -> Tensor:
    """Pad `x` (B, 3, H, W) to sides that are multiples of 64, as CompressAI does.

    The picture is centred and its border pixels are repeated.
    """
    top, left = geometry.origin(x.shape[2], x.shape[3])
    height, width = geometry.padded(x.shape[2], x.shape[3])
    bottom, right = height - x.shape[2] - top, width - x.shape[3] - left
    return F.pad(x, (left, right, top, bottom), mode="replicate")


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad`: a padded `x` -> (B, 3, height, width)."""
    top, left = geometry.origin(height, width)
    return x[:, :, top : top + height, left : left + width]


def to_tensor(pixels: Pixels) -> Tensor:
    """Convert `pixels` (H, W, 3) to (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255)


def to_pixels(x: Tensor) -> Pixels:
    """Convert `x` (1, 3, H, W) in [0, 1] to (H, W, 3) uint8, rounded."""
    return _pixels(to_samples(x))


def _pixels(samples: Tensor) -> Pixels:
    """(1, 3, H, W) uint8 -> (H, W, 3)."""
    return samples[0].permute(1, 2, 0).contiguous().numpy()


def crop_to_pixels(x: Tensor, height: int, width: int) -> Pixels:
    """Crop a padded `x` (1, 3, H, W) in [0, 1] and convert it to (height, width, 3) uint8."""
    return to_pixels(crop(x, height, width))


def _crc(symbols: Int32Array) -> int:
    return int(google_crc32c.value(symbols.astype("<i4", copy=False).tobytes()))
