"""Distances between pictures: MSE, PSNR, MS-SSIM, GMSD and LPIPS."""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import WeightsError

MS_SSIM_SIDE = 161
"""Smallest side for MS-SSIM: its 11-tap window must fit the coarsest of five scales."""
LPIPS_SIDE = 31
"""Smallest side for LPIPS: AlexNet's second pooling needs at least one window."""


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of pictures in [0, 1]."""
    return float((a - b).square().mean())


def psnr(value: float) -> float:
    """PSNR in dB of a mean squared error; infinite for 0."""
    return -10 * math.log10(value) if value else math.inf


def offset(a: Tensor, b: Tensor) -> float:
    """Largest difference of the channels' means in 1/255; `a`, `b` (1, 3, H, W) in [0, 1]."""
    return float((a - b).mean((0, 2, 3)).abs().max()) * 255


def ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale SSIM (Wang 2003), averaged over colour channels.

    `a`, `b` (1, 3, H, W) in [0, 1]; None if a side is below `MS_SSIM_SIDE`.
    """
    if min(a.shape[2:]) < MS_SSIM_SIDE:
        return None
    import piq

    return float(piq.multi_scale_ssim(a, b, data_range=1.0))


def gmsd(a: Tensor, b: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue 2014) of luma; (1, 3, H, W) in [0, 1]."""
    import piq

    return float(piq.gmsd(a, b, data_range=1.0))


def read_state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` or PyTorch file; `WeightsError` if it is neither."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
        reason = str(e).partition("\n")[0]
        raise WeightsError(f"{file}: not a weights file: {reason}") from e
    if not isinstance(state, dict):
        raise WeightsError(f"{file}: holds a {type(state).__name__}, not a dictionary of tensors")
    return state


class LpipsMetric:
    """LPIPS v0.1 (Zhang 2018) with the package `lpips`, which contains the linear layers."""

    def __init__(self, backbone: Literal["alex", "vgg"], weights: Path | None = None) -> None:
        """`weights`: file with the package's tensor names, or torchvision's file of the backbone.

        Without `weights` the package downloads them. Raises `WeightsError` if they do not fit.
        """
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # it uses deprecated options of torchvision
            local = weights is not None
            self.net: Any = lpips.LPIPS(net=backbone, pnet_rand=local, verbose=False)
        if weights is not None:
            self._load(weights)
        self.net.eval()

    def __call__(self, a: Tensor, b: Tensor) -> float:
        """Distance of `a` and `b`, (1, 3, H, W) in [0, 1]."""
        with torch.inference_mode():
            return float(self.net(a, b, normalize=True))

    def _load(self, file: Path) -> None:
        names = self.net.state_dict()
        by_layer = {k.split(".", 2)[-1]: k for k in names if k.startswith("net.")}
        state = read_state(file)
        if any(k.startswith("features.") for k in state):  # torchvision's: "features.0.weight"
            backbone = {k.removeprefix("features."): v for k, v in state.items()}
            state = {by_layer[k]: v for k, v in backbone.items() if k in by_layer}
        try:
            missing, unexpected = self.net.load_state_dict(state, strict=False)
        except RuntimeError as e:
            raise WeightsError(f"{file}: shapes differ from those of this LPIPS network") from e
        if unexpected or any(name.startswith("net.") for name in missing):
            raise WeightsError(f"{file}: not the weights of this LPIPS network")


class LpipsAlex(LpipsMetric):
    """LPIPS with AlexNet, whose backbone KID uses too."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__("alex", weights)

    def conv5(self, pictures: Tensor) -> Tensor:
        """conv5 after ReLU, averaged over positions: `pictures` (B, 3, H, W) -> (B, 256)."""
        with torch.inference_mode():
            maps: Tensor = self.net.net(self.net.scaling_layer(2 * pictures - 1)).relu5
            return maps.mean((2, 3))
