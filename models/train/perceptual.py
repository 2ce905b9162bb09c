"""Losses on the picture that the few-step decoder predicts."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from models.geometry import STRIDE_Y
from models.train import losses
from models.train.bank import Batch
from models.train.decoder_config import DiffusionConfig
from models.train.discriminator import Discriminator, discriminator_loss, generator_loss
from models.train.lpips import LpipsLoss
from models.train.task import TrainingStep, Update

LPIPS_STRIDE = 4
"""Stride of AlexNet's first layer, in pixels."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(picture, original), both (B, 3, H, W) in [0, 1] -> mean distance."""
TEXTURE: Mapping[str, Distance] = {
    "spectrum": losses.spectrum,
    "chroma_spectrum": losses.chroma_spectrum,
    "sparsity": losses.sparsity,
    "scene_statistics": losses.scene_statistics,
    "period": losses.period,
}
"""Distances of texture by the option that sets their weight."""


class PerceptualLoss:
    """LPIPS, distances of texture, and an adversarial term, if configured.

    Each term gets the picture without a random number of its first rows and columns. The decoder
    draws blocks of four pixels, and AlexNet's first layer has stride 4: without these offsets,
    LPIPS rewarded a hatching with a period of four pixels. LPIPS gets it mirrored in half of the
    steps: AlexNet's filters prefer one diagonal, and the decoder drew texture along it.
    """

    def __init__(
        self, config: DiffusionConfig, lpips: LpipsLoss | None, latents: int, device: torch.device
    ) -> None:
        self.config, self.lpips = config, lpips
        self.discriminator: Discriminator | None = None
        if config.adversarial:
            self.discriminator = Discriminator(latents).to(device)

    def terms(
        self, picture: Tensor, batch: Batch, step: TrainingStep
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Yield (name, weight, value) of every term that is configured and used in this step."""
        if self.lpips is not None:
            yield "lpips", 1.0, _lpips_term(self.lpips, picture, batch.x, step)
        for name, distance in TEXTURE.items():
            if weight := getattr(self.config, name):
                yield name, weight, _texture_term(distance, picture, batch.x, step)
        if self.discriminator and step.number >= self.config.adversarial_after:
            term = _adversarial_term(self.discriminator, picture, batch, step)
            yield "adversarial", self.config.adversarial, term

    def discriminator_updates(
        self, picture: Tensor, batch: Batch, step: TrainingStep
    ) -> Iterator[Update]:
        """Yield the update of the discriminator, if there is one. `picture` is detached."""
        if self.discriminator:
            offset = random_offset(step, STRIDE_Y)
            real = self.discriminator(batch.x, batch.x_hat, batch.y_hat, offset)
            generated = self.discriminator(picture, batch.x_hat, batch.y_hat, offset)
            loss = discriminator_loss(real, generated)
            yield Update("discriminator", loss, {"discriminator": loss.detach()})


def random_offset(step: TrainingStep, period: int) -> tuple[int, int]:
    """Draw a row and a column from 0 to `period` - 1, equal on all ranks."""
    return step.shared_random.randrange(period), step.shared_random.randrange(period)


def _lpips_term(lpips: LpipsLoss, picture: Tensor, x: Tensor, step: TrainingStep) -> Tensor:
    top, left = random_offset(step, LPIPS_STRIDE)
    picture, x = picture[:, :, top:, left:], x[:, :, top:, left:]
    if step.shared_random.random() < 0.5:
        picture, x = picture.flip(3), x.flip(3)
    return lpips(picture, x).mean()


def _texture_term(distance: Distance, picture: Tensor, x: Tensor, step: TrainingStep) -> Tensor:
    top, left = random_offset(step, losses.DCT // 2)
    return distance(picture[:, :, top:, left:], x[:, :, top:, left:])


def _adversarial_term(
    discriminator: Discriminator, picture: Tensor, batch: Batch, step: TrainingStep
) -> Tensor:
    offset = random_offset(step, STRIDE_Y)  # the discriminator's strides multiply to 16
    return generator_loss(discriminator(picture, batch.x_hat, batch.y_hat, offset))
