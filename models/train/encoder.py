"""The codec's encoder in torch alone, on any device, without entropy coding.

It computes what a decoder would receive for a picture. The bits per position are estimated from the
Gaussians from which the entropy coder's tables are computed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import checkpoint
from models.codec.msh import MeanScaleHyperprior
from models.errors import WeightsError
from models.geometry import STRIDE_Y, STRIDE_Z
from models.train.entropy import gaussian_likelihood, table_scales


class Encoder:
    """The frozen codec of one quality."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """`tensors` is a CompressAI state dict. Raises `WeightsError` if it is of another model."""
        try:
            m, n = tensors["g_a.6.weight"].shape[:2]
            self.net = MeanScaleHyperprior(n, m)
            state = {k: tensors[k].float() for k in self.net.state_dict()}
            self.net.load_state_dict(state)
            medians = tensors["entropy_bottleneck.quantiles"].float()[:, 0, 1]
        except (KeyError, RuntimeError) as e:
            reason = f"{e} is missing" if isinstance(e, KeyError) else e
            raise WeightsError(f"not a mean-scale hyperprior: {reason}") from e
        self.net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.medians = medians[None, :, None, None].to(device)
        self.weights_id = checkpoint.weights_id(tensors)

    @classmethod
    def load(cls, quality: int, folder: Path | None, device: torch.device) -> "Encoder":
        """Load `msh_q….safetensors` from `folder`, or the shipped weights if it is None."""
        if folder is not None:
            return cls(checkpoint.read(folder / f"msh_q{quality}.safetensors")[0], device)
        for entry in checkpoint.manifest():
            if (entry.kind, entry.quality, entry.metric) == ("codec", quality, "mse"):
                return cls(checkpoint.load(entry), device)
        raise WeightsError(f"no codec of quality {quality} is shipped; name a folder with --codecs")

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`x` (3, H, W) uint8, sides multiples of 16 -> the tensors of one bank entry.

        `x`, `x_hat` (3, H, W) uint8; `y_hat` (M, H/16, W/16), `bits` (1, H/16, W/16) float16.
        CUDA uses TF32: an H100 encoded about 100 photographs per second, and 13 in float32. TF32
        rounds a latent of 60 by 1/16 of the quantiser's step, which would break a bitstream but is
        harmless in training data.
        """
        height, width = x.shape[1:]
        padding = (0, -width % STRIDE_Z, 0, -height % STRIDE_Z)
        picture = F.pad(x[None].to(self.medians.device).float() / 255, padding, mode="replicate")
        rows, columns = height // STRIDE_Y, width // STRIDE_Y
        y = self.net.g_a(picture)
        z_hat = torch.round(self.net.h_a(y) - self.medians) + self.medians
        scales_hat, means_hat = self.net.h_s(z_hat).chunk(2, 1)
        symbols = torch.round(y - means_hat)
        y_hat = symbols + means_hat
        x_hat = self.net.g_s(y_hat)[0, :, :height, :width].clamp(0, 1)
        p = gaussian_likelihood(symbols, table_scales(scales_hat), torch.zeros_like(symbols))
        bits = -p.log2().sum(1)
        return {
            "x": x,
            "x_hat": (x_hat * 255).round().to(torch.uint8),
            "y_hat": y_hat[0, :, :rows, :columns].half(),
            "bits": bits[:, :rows, :columns].half(),
        }
