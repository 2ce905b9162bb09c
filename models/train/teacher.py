"""A trained decoder whose pictures a smaller one learns to draw."""

import torch
from torch import Tensor

from models.diffusion.schedule import Continuous
from models.diffusion.unet import UNet
from models.train import losses
from models.train.bank import Batch
from models.train.network import Network


class Teacher:
    """A decoder of one call. It is not trained."""

    def __init__(self, net: UNet, device: torch.device, bf16: bool) -> None:
        self.network = Network(net.requires_grad_(False), device, bf16, compiled=False)
        self._qualities = frozenset(net.trained_qualities())

    def knows(self, quality: Tensor) -> bool:
        """Return True if the teacher was trained on all of the qualities (B,)."""
        return self._qualities.issuperset(quality.tolist())

    @torch.no_grad()
    def picture(self, batch: Batch, noise: Tensor, keep: Tensor) -> Tensor:
        """Draw the pictures (B, 3, s, s) of a batch from `noise`; they are not clamped.

        `keep` (B,) is 0 for crops whose latents are hidden and 1 for others.
        """
        denoise = self.network.denoiser_for(batch, 1.0, keep)
        return self.network.picture(batch, losses.rollout(denoise, noise, Continuous().steps(1)))
