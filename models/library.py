"""All models that are installed, and the two ways through them."""

import contextlib
import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import image
from models.codec import bitstream, catalogue, codec, zoo
from models.codec.bitstream import Bitstream, Metric
from models.codec.codec import Codec
from models.codec.hyperprior import Latents
from models.diffusion import decoder, realism
from models.diffusion.decoder import Decoder, DiffusionInput, OnPicture
from models.tiers import Settings


@dataclass(frozen=True, slots=True)
class Library:
    """The shipped codecs, the user's, and the diffusion decoder where this process draws itself."""

    codecs: Mapping[tuple[int, Metric], Codec]
    decoder: Decoder | None
    imports: zoo.Imports = field(default_factory=zoo.Imports)

    def codec(self, b: Bitstream) -> Codec:
        """The codec that made `b`; `WrongWeights` where it is not installed."""
        return self.find(b.quality, b.metric, b.weights_id)

    def find(self, quality: int, metric: Metric, weights_id: str = "") -> Codec:
        """By weights id; where there is none the user's last import, else what is shipped.

        Raises `WrongWeights`, `WeightsError` where an import's file is altered.
        """
        row = self.imports.find(quality, metric, weights_id)
        return self._shipped(quality, metric, weights_id) if row is None else self.imports.load(row)

    def codec_id(self, b: Bitstream) -> str:
        """The weights id of `codec(b)`, which is not loaded for it. Raises `WrongWeights`."""
        row = self.imports.find(b.quality, b.metric, b.weights_id)
        if row is not None:
            return row.entry.weights_id
        return self._shipped(b.quality, b.metric, b.weights_id).weights_id

    def weights_ids(self, b: Bitstream) -> tuple[str, str]:
        """Ids of the codec's and the diffusion decoder's weights that draw `b`."""
        return self.codec_id(b), self.decoder.weights_id if self.decoder else ""

    def _shipped(self, quality: int, metric: Metric, weights_id: str) -> Codec:
        found = self.codecs.get((quality, metric))
        if found is None or weights_id not in {"", found.weights_id}:
            raise catalogue.wrong_weights(quality, metric, weights_id)
        return found

    def instant(self, b: Bitstream) -> tuple[Latents, Tensor]:
        """Bitstream -> latents, and the codec's picture of them (1, 3, H, W), still padded."""
        own = self.codec(b)
        latents = own.latents(b)
        return latents, own.synthesis(latents.y_hat)

    def perceptual(
        self,
        b: Bitstream,
        settings: Settings,
        seed: int,
        on_step: OnPicture | None = None,
        alpha: float = 1.0,
    ) -> image.Pixels:
        """Bitstream -> the diffusion decoder's picture (H, W, 3), at realism `alpha`.

        Latents of codecs that the decoder has not learned stay hidden from it.
        """
        draft = self.draft(b, seed)
        x = self.diffusion.sample_batch([draft], settings, on_step)
        return codec.to_pixels(codec.crop(realism.mix(draft.x_hat, x, alpha), b.height, b.width))

    def draft(self, b: Bitstream, seed: int) -> DiffusionInput:
        """Bitstream -> what the diffusion decoder begins with. Raises as `Codec.latents`."""
        latents, x_hat = self.instant(b)
        shipped = {own.weights_id for own in self.codecs.values()}
        learned = self.decoder.codecs if self.decoder else None
        latents_visible = self.codec_id(b) in (shipped if learned is None else learned)
        return DiffusionInput(latents, x_hat, b.quality, seed, latents_visible)

    @property
    def diffusion(self) -> Decoder:
        """The diffusion decoder; `ValueError` in a process that was started without it."""
        if self.decoder is None:
            raise ValueError("this process was started without the diffusion decoder")
        return self.decoder

    def warm_up(self) -> None:
        """One small picture both ways, so that what is compiled on first use is compiled now.

        What loading took and left goes back to the system, where its allocator can give it back.
        """
        pixels = np.full((64, 64, 3), 128, np.uint8)
        for own in self.codecs.values():
            b = own.encode(codec.to_tensor(pixels), "msh", "exact")
            self.instant(bitstream.parse(bitstream.serialize(b)))
            if self.decoder is not None:
                self.perceptual(b, Settings("ddim", 1), 0)
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)


def load(threads: int = 0, with_decoder: bool = True, folder: Path | None = None) -> Library:
    """Load the shipped weights, and look up what was imported into the user's `folder`.

    `threads` CPU threads, torch's own choice where it is 0. The decoder draws on CUDA where there
    is a device, the codecs' pictures are made on the CPU. Raises `WeightsError`.
    """
    if threads:
        torch.set_num_threads(threads)
    codecs: dict[tuple[int, Metric], Codec] = {(q, "mse"): zoo.load(q) for q in zoo.QUALITIES}
    imports = zoo.Imports(catalogue.imported(folder))
    drawing = decoder.load(device=device()) if with_decoder else None
    return Library(codecs, drawing, imports)


def device() -> torch.device:
    """That draws: CUDA's first, where there is one (`CUDA_VISIBLE_DEVICES` chooses, or hides)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def provenance(
    tier: str, settings: Settings, seed: int, codec_id: str, decoder_id: str, alpha: float = 1.0
) -> dict[str, str]:
    """Metadata that say what a synthesised picture is."""
    return {
        "Software": "Afterimage",
        "Comment": "synthesised detail: drawn by a diffusion decoder, not recorded by a camera",
        "afterimage:tier": tier,
        "afterimage:sampler": f"{settings.sampler} eta={settings.eta} gamma={settings.gamma} "
        f"beta={settings.beta} guidance={settings.guidance}",
        "afterimage:steps": str(settings.steps),
        "afterimage:seed": str(seed),
        "afterimage:realism": str(alpha),
        "afterimage:weights": f"codec {codec_id}, decoder {decoder_id}",
    }
