"""The discriminator of phase 2: tells photographs from pictures of the decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.geometry import STRIDE_Y

_LATENTS = 12
"""Number of channels to which `y_hat` is reduced before it is upsampled to pixels, as in HiFiC."""


class Discriminator(nn.Module):
    """Spectral-norm patch discriminator, conditioned on the codec's picture and latents.

    Mentzer 2020 (HiFiC): four strided convolutions, a logit per 16×16 pixels.
    """

    def __init__(self, latents: int, width: int = 64) -> None:
        super().__init__()
        self.latents = spectral_norm(nn.Conv2d(latents, _LATENTS, 1))
        channels = (6 + _LATENTS, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, o in zip(channels[:-1], channels[1:], strict=True):
            layers += [spectral_norm(nn.Conv2d(i, o, 4, 2, 1)), nn.LeakyReLU(0.2)]
        layers.append(spectral_norm(nn.Conv2d(channels[-1], 1, 1)))
        self.layers = nn.Sequential(*layers)

    def forward(
        self, x: Tensor, x_hat: Tensor, y_hat: Tensor, offset: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """`x`, `x_hat` (B, 3, H, W) in [0, 1], `y_hat` (B, M, H/16, W/16) -> logits.

        Rows and columns before `offset` are cut off. The product of the strides is 16, so offsets
        from 0 to 15 shift a periodic pattern against the grid of the convolutions.
        """
        latents = F.leaky_relu(self.latents(torch.tanh(y_hat / 4)), 0.2)  # y_hat reaches ±60
        upsampled = F.interpolate(latents, scale_factor=float(STRIDE_Y), mode="nearest")
        stacked = torch.cat([x * 2 - 1, x_hat * 2 - 1, upsampled], 1)
        logits: Tensor = self.layers(stacked[:, :, offset[0] :, offset[1] :])
        return logits


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits for photographs and for generated pictures."""
    return F.relu(1 - real).mean() + F.relu(1 + generated).mean()


def generator_loss(generated: Tensor) -> Tensor:
    """Adversarial loss of the decoder, from the logits for its pictures."""
    return -generated.mean()
