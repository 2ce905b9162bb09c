"""A codec: one set of weights, between pictures and bitstreams."""

from dataclasses import dataclass

import google_crc32c
import torch
import torch.nn.functional as F
from torch import Tensor

from models import geometry
from models.codec.bitstream import Bitstream, Format, Metric, Profile
from models.codec.hyperprior import Hyperprior, Latents
from models.codec.msh import MeanScaleHyperprior
from models.codec.rans import Int32Array
from models.codec.synthesis import Synthesis
from models.errors import ChecksumMismatch, WrongWeights
from models.image import Pixels


@dataclass(frozen=True, slots=True)
class Codec:
    """Ready to run on the CPU."""

    quality: int
    metric: Metric
    weights_id: str
    net: MeanScaleHyperprior
    hyperprior: Hyperprior
    synthesis: Synthesis

    def latents(self, b: Bitstream) -> Latents:
        """The one function that yields `y_hat`.

        Raises `WrongWeights`, `CorruptStream`, `DesynchronisedStream` or `ChecksumMismatch`.
        """
        if b.weights_id and b.weights_id != self.weights_id:
            raise WrongWeights(
                f"coded with weights {b.weights_id}; quality {b.quality} here is {self.weights_id}"
            )
        size = geometry.padded(b.height, b.width)
        latents = self.hyperprior.decode(b.y_string, b.z_string, size, b.profile)
        if b.symbols_crc is not None and _crc(latents.symbols) != b.symbols_crc:
            raise ChecksumMismatch("the decoded symbols are not the encoded ones")
        return latents

    def encode(self, x: Tensor, format: Format, profile: Profile) -> Bitstream:
        """`x` (1, 3, H, W) in [0, 1] -> bitstream; CompressAI's format is always `float`."""
        if format == "compressai":
            profile = "float"
        y_string, z_string, latents = self.hyperprior.encode(pad(x), profile)
        height, width = x.shape[2:]
        own = (self.weights_id, _crc(latents.symbols)) if format == "msh" else ("", None)
        return Bitstream(
            format, profile, self.quality, self.metric, height, width, y_string, z_string, *own
        )


def pad(x: Tensor) -> Tensor:
    """`x` (B, 3, H, W) -> multiples of 64, centred as CompressAI does it, borders repeated."""
    top, left = geometry.origin(x.shape[2], x.shape[3])
    height, width = geometry.padded(x.shape[2], x.shape[3])
    bottom, right = height - x.shape[2] - top, width - x.shape[3] - left
    return F.pad(x, (left, right, top, bottom), mode="replicate")


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """What `pad` added, taken away: (B, 3, H, W) of a picture's own size."""
    top, left = geometry.origin(height, width)
    return x[:, :, top : top + height, left : left + width]


def to_tensor(pixels: Pixels) -> Tensor:
    """`pixels` (H, W, 3) -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def to_pixels(x: Tensor) -> Pixels:
    """`x` (1, 3, H, W) in [0, 1] -> (H, W, 3), rounded."""
    return (x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _crc(symbols: Int32Array) -> int:
    return int(google_crc32c.value(symbols.astype("<i4", copy=False).tobytes()))
