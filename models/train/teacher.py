"""A trained decoder whose pictures a smaller one learns to draw."""

from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint
from models.diffusion import schedule
from models.diffusion.unet import read_network
from models.train.bank import Batch
from models.train.network import Network


class Teacher:
    """A decoder of one call. It is not trained."""

    def __init__(self, file: Path, device: torch.device, bf16: bool) -> None:
        """Read `file`. Raises `WeightsError` if it holds no decoder."""
        net = read_network(*checkpoint.read(file), file).requires_grad_(False)
        self.network = Network(net, device, bf16, compiled=False)

    def knows(self, quality: Tensor) -> bool:
        """Return True if the teacher was trained on all of the qualities (B,)."""
        return bool((self.network.net.scales[quality] != 1).all())

    @torch.no_grad()
    def picture(self, batch: Batch, noise: Tensor, keep: Tensor) -> Tensor:
        """Draw the pictures (B, 3, s, s) of a batch from `noise`; they are not clamped.

        `keep` (B,) is 0 for crops whose latents are hidden and 1 for others.
        """
        t = torch.ones(len(noise), device=noise.device)
        v = self.network.denoiser_for(batch, 1.0, keep)(noise, t)
        return self.network.picture(batch, schedule.x0_from_v(noise, v, schedule.alpha_bar(1.0)))
