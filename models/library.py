"""All models that are installed, loaded once, and the two ways through them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import bitstream, codec, decoder, image, zoo
from models.bitstream import Bitstream, Metric
from models.codec import Codec
from models.decoder import Decoder, OnPicture
from models.errors import WrongWeights
from models.hyperprior import Latents
from models.tiers import Settings


@dataclass(frozen=True, slots=True)
class Library:
    """All codecs, and the diffusion decoder where this process draws pictures itself."""

    codecs: Mapping[tuple[int, Metric], Codec]
    decoder: Decoder | None

    def codec(self, b: Bitstream) -> Codec:
        """The codec that made `b`; `WrongWeights` where it is not installed."""
        found = self.codecs.get((b.quality, b.metric))
        if found is None:
            raise WrongWeights(f"no weights for quality {b.quality}, metric {b.metric} are here")
        return found

    def weights_ids(self, b: Bitstream) -> tuple[str, str]:
        """Ids of the codec's and the diffusion decoder's weights that draw `b`."""
        return self.codec(b).weights_id, self.decoder.weights_id if self.decoder else ""

    def instant(self, b: Bitstream) -> tuple[Latents, Tensor]:
        """Bitstream -> latents, and the codec's picture of them (1, 3, H, W), still padded."""
        own = self.codec(b)
        latents = own.latents(b)
        return latents, own.synthesis(latents.y_hat)

    def perceptual(
        self, b: Bitstream, settings: Settings, seed: int, on_step: OnPicture | None = None
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


def load(threads: int = 0, with_decoder: bool = True) -> Library:
    """Load the shipped weights; `threads` CPU threads, torch's own choice where it is 0.

    Raises `WeightsError`.
    """
    if threads:
        torch.set_num_threads(threads)
    codecs: dict[tuple[int, Metric], Codec] = {(q, "mse"): zoo.load(q) for q in zoo.QUALITIES}
    return Library(codecs, decoder.load() if with_decoder else None)


def provenance(
    tier: str, settings: Settings, seed: int, codec_id: str, decoder_id: str
) -> dict[str, str]:
    """PNG text that says what a synthesised picture is."""
    return {
        "Software": "Afterimage",
        "Comment": "synthesised detail: drawn by a diffusion decoder, not recorded by a camera",
        "afterimage:tier": tier,
        "afterimage:sampler": f"{settings.sampler} eta={settings.eta} gamma={settings.gamma} "
        f"beta={settings.beta}",
        "afterimage:steps": str(settings.steps),
        "afterimage:seed": str(seed),
        "afterimage:weights": f"codec {codec_id}, decoder {decoder_id}",
    }
