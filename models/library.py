"""All installed models, and the two ways to decode: by the codec alone, or by diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from models import geometry, image, memory, tiers
from models.codec import architectures, bitstream, catalogue, codec, context, zoo
from models.codec.architectures import DEFAULT
from models.codec.bitstream import Bitstream, Metric
from models.codec.codec import Codec
from models.diffusion import decoder, realism
from models.diffusion.decoder import Decoder, DiffusionInput, OnPicture
from models.tiers import Settings

ROWS = 256
"""Rows of a picture that are mixed at a time."""


@dataclass(frozen=True, slots=True)
class Library:
    """Shipped codecs, imported codecs, and the diffusion decoders.

    `decoders` are those of `decoder.load_all`. It is empty in a process that draws no diffusion
    pictures itself.
    """

    codecs: Mapping[tuple[int, Metric], Codec]
    decoders: Mapping[int, Decoder] = field(default_factory=dict)
    imports: zoo.Imports = field(default_factory=zoo.Imports)

    def codec(self, b: Bitstream) -> Codec:
        """Return the codec that encoded `b`. Raises `WrongWeights` if it is not installed."""
        r = self._resolved(b)
        return self.find(r.quality, r.metric, r.weights_id, r.model)

    def read(self, b: Bitstream) -> Bitstream:
        """Return `b` as a bitstream of the model whose weights are installed.

        The header of a file in CompressAI's format can fit several models. If several of them are
        installed, the first whose entropy decoder ends in the right state is chosen, or else the
        first of all. If none is installed, `b` is returned unchanged.
        """
        readings = [r for r in b.readings if self._installed(r)]
        for r in readings if len(readings) > 1 else ():
            codec = self.find(r.quality, r.metric, model=r.model)
            size = geometry.padded(r.height, r.width)
            if codec.latent_coder.fits(r.y_string, r.z_string, size):
                return replace(r, others=())
        return replace(readings[0], others=b.others) if readings else b

    def find(
        self, quality: int, metric: Metric, weights_id: str = "", model: str = DEFAULT
    ) -> Codec:
        """Return the codec of this model with this quality, metric and weights id.

        Without a weights id it is the latest import, or the shipped codec if nothing was imported.
        Raises `WrongWeights` if there is none, `WeightsError` if an import's file is altered.
        """
        row = self.imports.find(quality, metric, weights_id, model)
        if row is not None:
            return self.imports.load(row)
        return self._shipped(quality, metric, weights_id, model)

    def codec_id(self, b: Bitstream) -> str:
        """Return the weights id of `codec(b)`, without loading it if `b` has only one reading.

        Raises `WrongWeights`.
        """
        r = self._resolved(b)
        row = self.imports.find(r.quality, r.metric, r.weights_id, r.model)
        if row is not None:
            return row.entry.weights_id
        return self._shipped(r.quality, r.metric, r.weights_id, r.model).weights_id

    def weights_ids(self, b: Bitstream, settings: Settings) -> tuple[str, str]:
        """Return the weights ids of the codec for `b` and of the decoder for `settings`.

        Raises `WrongWeights` if the codec is not installed, `ValueError` without decoders.
        """
        return self.codec_id(b), self.decoder(settings).weights_id

    def _installed(self, b: Bitstream) -> bool:
        if self.imports.find(b.quality, b.metric, b.weights_id, b.model) is not None:
            return True
        return b.model == DEFAULT and (b.quality, b.metric) in self.codecs

    def _resolved(self, b: Bitstream) -> Bitstream:
        r = self.read(b)
        if not self._installed(r):
            models = [each.model for each in b.readings]
            raise catalogue.wrong_weights(b.quality, b.metric, b.weights_id, models)
        return r

    def _shipped(self, quality: int, metric: Metric, weights_id: str, model: str) -> Codec:
        shipped = self.codecs.get((quality, metric)) if model == DEFAULT else None
        if shipped is None or weights_id not in {"", shipped.weights_id}:
            raise catalogue.wrong_weights(quality, metric, weights_id, (model,))
        return shipped

    def draw(
        self,
        b: Bitstream,
        settings: Settings,
        seed: int,
        on_step: OnPicture | None = None,
        alpha: float = 1.0,
    ) -> image.Pixels:
        """Decode a bitstream by diffusion, with any settings: (H, W, 3), at realism `alpha`.

        `on_step` is called after each sampler step. Raises as `diffusion_input` does.
        """
        diffusion_input = self.diffusion_input(b, settings, seed)
        x = self.decoder(settings).sample_batch([diffusion_input], settings, on_step)
        mixed = realism.mix(diffusion_input.x_hat, x, alpha)
        return codec.crop_to_pixels(mixed, b.height, b.width)

    def diffusion_input(self, b: Bitstream, settings: Settings, seed: int) -> DiffusionInput:
        """Decode a bitstream to the input of the decoder for `settings`.

        The latents are hidden from the decoder unless it was trained with their codec. Raises as
        `Codec.latents` does, and `ValueError` without decoders.
        """
        latents, x_hat = self.codec(b).reconstruct(b)
        trained = self.decoder(settings).codecs
        if trained is None:
            trained = frozenset(c.weights_id for c in self.codecs.values())
        latents_visible = self.codec_id(b) in trained
        return DiffusionInput(latents, x_hat, b.quality, seed, latents_visible)

    def at_realism(self, b: Bitstream, pixels: image.Pixels, alpha: float) -> image.Pixels:
        """Mix the instant picture of `b` with its finished diffusion picture, `pixels` (H, W, 3).

        `alpha` 0 is the instant picture, 1 is `pixels`. Raises as `Codec.latents` does.
        """
        x_hat = codec.crop(self.codec(b).reconstruct(b)[1], b.height, b.width)
        mixed = np.empty_like(pixels)
        for top in range(0, b.height, ROWS):  # a picture in float32 takes four times its memory
            rows = slice(top, top + ROWS)
            x = codec.to_tensor(pixels[rows])
            mixed[rows] = codec.to_pixels(realism.mix(x_hat[:, :, rows], x, alpha))
        return mixed

    def decoder(self, settings: Settings) -> Decoder:
        """The diffusion decoder for `settings`.

        Raises `ValueError` if none was loaded in this process.
        """
        if not self.decoders:
            raise ValueError("no diffusion decoder is loaded; use load(with_decoders=True)")
        return tiers.decoder_for(self.decoders, settings)

    @property
    def device(self) -> torch.device:
        """The device of the diffusion decoders. Raises `ValueError` if none was loaded."""
        return self.decoder(Settings("ddim", 1)).device

    def warm_up(self) -> None:
        """Decode one small picture with each shipped codec, so that all lazy compilation happens
        now; that for autoregressive models only if one of the imports is such a model.

        Afterwards memory that was needed only for loading is returned to the system (glibc only).
        """
        x = codec.to_tensor(np.full((64, 64, 3), 128, np.uint8))
        for shipped in self.codecs.values():
            b = shipped.encode(x, "msh", "exact")
            self.codec(b).decode(bitstream.parse(bitstream.serialize(b)))
            for diffusion in self.decoders.values():
                latents, x_hat = self.codec(b).reconstruct(b)
                item = DiffusionInput(latents, x_hat, b.quality, 0)
                diffusion.sample_batch([item], Settings("ddim", 1))
        models = {catalogue.model_of(row.entry) for row in self.imports.rows} - {""}
        if any(architectures.find(model).autoregressive for model in models):
            context.warm_up()
        memory.trim()


def load(
    threads: int = 0,
    with_decoders: bool = True,
    folder: Path | None = None,
    lazily: bool = False,
) -> Library:
    """Load the shipped weights; list the imported ones in the user's `folder` without loading them.

    With `lazily`, each shipped codec is loaded on first use, too.
    `threads` is the number of CPU threads, 0 for torch's default. Codecs run on the CPU, the
    diffusion decoders on a CUDA device if there is one. Raises `WeightsError`.
    """
    if threads:
        torch.set_num_threads(threads)
    shipped = zoo.Shipped()
    codecs = shipped if lazily else dict(shipped)
    imports = zoo.Imports(catalogue.imported(folder))
    decoders = decoder.load_all(device=device()) if with_decoders else {}
    return Library(codecs, decoders, imports)


def device() -> torch.device:
    """Return the device for diffusion: the first CUDA device, otherwise the CPU.

    `CUDA_VISIBLE_DEVICES` chooses another CUDA device, or hides them all.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def provenance(
    tier: str, settings: Settings, seed: int, codec_id: str, decoder_id: str, alpha: float = 1.0
) -> dict[str, str]:
    """Return the metadata to write into a synthesised picture's file."""
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
