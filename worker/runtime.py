"""Models loaded once per process, and the two ways through them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import bitstream, codec, decoder, image, zoo
from models.bitstream import Bitstream, Metric
from models.codec import Codec
from models.decoder import Decoder
from models.errors import WrongWeights
from models.hyperprior import Latents
from models.sampler import OnStep
from models.tiers import Settings


@dataclass(frozen=True, slots=True)
class Runtime:
    """All codecs, and the diffusion decoder where this process draws pictures itself."""

    codecs: Mapping[tuple[int, Metric], Codec]
    decoder: Decoder | None

    def codec(self, b: Bitstream) -> Codec:
        """The codec that made `b`; `WrongWeights` where it is not installed."""
        found = self.codecs.get((b.quality, b.metric))
        if found is None:
            raise WrongWeights(f"no weights for quality {b.quality}, metric {b.metric} are here")
        return found

    def instant(self, b: Bitstream) -> tuple[Latents, Tensor]:
        """Bitstream -> latents, and the codec's picture of them (1, 3, H, W), still padded."""
        own = self.codec(b)
        latents = own.latents(b)
        return latents, own.synthesis(latents.y_hat)

    def perceptual(
        self, b: Bitstream, settings: Settings, seed: int, on_step: OnStep | None = None
    ) -> image.Pixels:
        """Bitstream -> the diffusion decoder's picture (H, W, 3)."""
        if self.decoder is None:
            raise ValueError("this process was started without the diffusion decoder")
        latents, x_hat = self.instant(b)
        x = self.decoder.sample(latents, x_hat, b.quality, settings, seed, on_step)
        return codec.to_pixels(codec.crop(x, b.height, b.width))

    def warm_up(self) -> None:
        """One small picture both ways, so that what is compiled on first use is compiled now."""
        pixels = np.full((64, 64, 3), 128, np.uint8)
        for own in self.codecs.values():
            b = own.encode(codec.to_tensor(pixels), "msh", "exact")
            self.instant(bitstream.parse(bitstream.serialize(b)))
            if self.decoder is not None:
                self.perceptual(b, Settings("ddim", 1), 0)


def load(threads: int = 0, with_decoder: bool = True) -> Runtime:
    """Load the shipped weights; `threads` CPU threads, all cores where it is 0.

    Raises `WeightsError`.
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)
    codecs: dict[tuple[int, Metric], Codec] = {(q, "mse"): zoo.load(q) for q in zoo.QUALITIES}
    return Runtime(codecs, decoder.load() if with_decoder else None)
