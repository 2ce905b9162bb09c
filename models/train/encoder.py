"""The codec's encoding side in torch alone, on any device: what a decoder will know of a picture.

No entropy coder: a position's bits are those of the Gaussians that the coder's tables are made of.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import checkpoint
from models.codec.msh import MeanScaleHyperprior
from models.errors import WeightsError
from models.geometry import STRIDE_Y
from models.train.entropy import gaussian_likelihood, tabled

STRIDE_Z = 64
"""Pixels between two positions of z."""


class Encoder:
    """The frozen codec of one quality."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """`tensors` have CompressAI's names; `WeightsError` where they are no such codec's."""
        try:
            m, n = tensors["g_a.6.weight"].shape[:2]
            self.net = MeanScaleHyperprior(n, m)
            state = {k: tensors[k].float() for k in self.net.state_dict()}
            self.net.load_state_dict(state)
            medians = tensors["entropy_bottleneck.quantiles"].float()[:, 0, 1]
        except (KeyError, RuntimeError) as e:
            raise WeightsError(f"no mean-scale hyperprior: {e}") from e
        self.net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.medians = medians[None, :, None, None].to(device)
        self.weights_id = checkpoint.weights_id(tensors)

    @classmethod
    def load(cls, quality: int, folder: Path | None, device: torch.device) -> "Encoder":
        """`folder`'s `msh_q….safetensors`; without a folder, the shipped weights."""
        if folder is not None:
            return cls(checkpoint.read(folder / f"msh_q{quality}.safetensors")[0], device)
        for entry in checkpoint.manifest():
            if (entry.kind, entry.quality, entry.metric) == ("codec", quality, "mse"):
                return cls(checkpoint.load(entry), device)
        raise WeightsError(f"no codec of quality {quality} is installed")

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`x` (3, H, W) uint8, sides multiples of 16 -> the tensors of one entry of a bank.

        `x`, `x_hat` (3, H, W) uint8; `y_hat` (M, H/16, W/16), `bits` (1, H/16, W/16) float16.
        On CUDA in TF32, which rounds a latent of 60 by a sixteenth of the quantiser's step: that
        matters to a bitstream, not to an example. A dozen processes and more on one H100 encoded 13
        photographs a second in float32, about a hundred in TF32.
        """
        height, width = x.shape[1:]
        beyond = (0, -width % STRIDE_Z, 0, -height % STRIDE_Z)
        picture = F.pad(x[None].to(self.medians.device).float() / 255, beyond, mode="replicate")
        rows, columns = height // STRIDE_Y, width // STRIDE_Y
        y = self.net.g_a(picture)
        z_hat = torch.round(self.net.h_a(y) - self.medians) + self.medians
        scales_hat, means_hat = self.net.h_s(z_hat).chunk(2, 1)
        symbols = torch.round(y - means_hat)
        y_hat = symbols + means_hat
        x_hat = self.net.g_s(y_hat)[0, :, :height, :width].clamp(0, 1)
        p = gaussian_likelihood(symbols, tabled(scales_hat), torch.zeros_like(symbols))
        bits = -p.log2().sum(1)
        return {
            "x": x,
            "x_hat": (x_hat * 255).round().to(torch.uint8),
            "y_hat": y_hat[0, :, :rows, :columns].half(),
            "bits": bits[:, :rows, :columns].half(),
        }
