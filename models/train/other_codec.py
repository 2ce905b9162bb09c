"""Pictures of other codecs, to train a decoder that cannot read their latents.

This module needs the packages of the service's codec; the rest of the trainer does not.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.codec import codec, interchange, state_dicts, zoo
from models.geometry import STRIDE_Y


class OtherCodec:
    """A codec of any supported architecture. It encodes and decodes real bitstreams on the CPU."""

    def __init__(self, file: Path, quality: int) -> None:
        """The codec may have any number of channels.

        Raises `WeightsError` if `file` is no checkpoint.
        """
        state = interchange.read(file)
        model = state_dicts.detect(state)
        self.codec = zoo.from_tensors(zoo.with_tables(state), quality, model=model)
        self.weights_id = self.codec.weights_id

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`x` (3, H, W) uint8, sides multiples of 16 -> `x`, `x_hat` and `bits` of a bank entry."""
        height, width = x.shape[1:]
        b = self.codec.encode(x[None].float() / 255, "compressai", "float")
        latents, x_hat = self.codec.reconstruct(b)
        pixels = codec.crop_to_pixels(x_hat, height, width)
        bits = latents.bits[: height // STRIDE_Y, : width // STRIDE_Y]
        return {
            "x": x,
            "x_hat": torch.from_numpy(pixels).permute(2, 0, 1),
            "bits": torch.from_numpy(bits)[None].half(),
        }
