"""The adversarial term of phase 2: is this picture the photograph or the decoder's?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.geometry import STRIDE_Y

_LATENTS = 12
"""Channels that `y_hat` is reduced to before it is laid over the pixels (HiFiC's number)."""


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
        self, x: Tensor, x_hat: Tensor, y_hat: Tensor, place: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """`x`, `x_hat` (B, 3, H, W) in [0, 1], `y_hat` (B, M, H/16, W/16) -> logits.

        It looks from the pixel at `place` on, since its strides see the same phase everywhere.
        """
        seen = F.leaky_relu(self.latents(torch.tanh(y_hat / 4)), 0.2)  # latents reach ±60
        over = F.interpolate(seen, scale_factor=float(STRIDE_Y), mode="nearest")
        whole = torch.cat([x * 2 - 1, x_hat * 2 - 1, over], 1)
        logits: Tensor = self.layers(whole[:, :, place[0] :, place[1] :])
        return logits


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss of the logits."""
    return F.relu(1 - real).mean() + F.relu(1 + made).mean()


def generator_loss(made: Tensor) -> Tensor:
    """What the decoder wants of the logits."""
    return -made.mean()
