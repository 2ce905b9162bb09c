"""A trained decoder whose pictures a smaller one learns to draw."""

import torch
from torch import Tensor

from models.diffusion.schedule import Continuous
from models.diffusion.unet import UNet
from models.errors import WeightsError
from models.train import losses
from models.train.bank import Batch
from models.train.network import Network


class Teacher:
    """A decoder of one call. It is not trained."""

    def __init__(self, net: UNet, latents: int, device: torch.device, bf16: bool) -> None:
        """`latents` is the number of latent channels of the pictures to be drawn.

        Raises `WeightsError` if the network was trained for latents of another number, or for
        pictures of no quality, as those of the preset `paper`.
        """
        if net.config.latents != latents or not net.trained_qualities():
            raise WeightsError(
                f"--teacher: it is a {net.config.preset} network of {net.config.latents} latent "
                f"channels; choose a compact one for {latents}"
            )
        self.network = Network(net.requires_grad_(False), device, bf16, compiled=False)
        self._known = torch.zeros(len(net.scales), device=device)
        self._known[net.trained_qualities()] = 1

    def distance(self, picture: Tensor, batch: Batch, noise: Tensor, keep: Tensor) -> Tensor:
        """Squared error of `picture` to the teacher's, over that of the codec's pictures.

        Crops of qualities that the teacher was not trained on do not count. `picture` and `noise`
        are (B, 3, s, s); `keep` (B,) is 0 for crops whose latents are hidden and 1 for others.
        """
        drawn = self._picture(batch, noise, keep)
        known = self._known[batch.quality]
        errors, codec_errors = (
            (p - q).square().mean((1, 2, 3)) * known
            for p, q in ((picture, drawn), (batch.x_hat, batch.x))
        )
        return errors.sum() / codec_errors.sum().clamp(min=1e-12)

    @torch.no_grad()
    def _picture(self, batch: Batch, noise: Tensor, keep: Tensor) -> Tensor:
        """Draw the pictures (B, 3, s, s) of a batch from `noise`; they are not clamped."""
        denoise = self.network.denoiser_for(batch, 1.0, keep)
        return self.network.picture(batch, losses.rollout(denoise, noise, Continuous().steps(1)))
