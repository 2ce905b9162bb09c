"""Distances between pictures, most of them from kept libraries; weights come from local files."""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import piq  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import WeightsError

MS_SSIM_SIDE = 161
"""The 11-tap window at the coarsest of five scales: smaller pictures have no MS-SSIM."""
LPIPS_SIDE = 31
"""Below this AlexNet's second pooling has nothing left to pool."""


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of pictures in [0, 1]."""
    return float((a - b).square().mean())


def psnr(value: float) -> float:
    """Mean squared error in [0, 1]² -> dB."""
    return -10 * math.log10(value) if value else math.inf


def offset(a: Tensor, b: Tensor) -> float:
    """Largest difference of the channels' means, in 1/255. `a`, `b` (1, 3, H, W) in [0, 1]."""
    return float((a - b).mean((0, 2, 3)).abs().max()) * 255


def ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale SSIM (Wang 2003), mean of the colour channels; None below `MS_SSIM_SIDE`.

    `a`, `b` (1, 3, H, W) in [0, 1].
    """
    if min(a.shape[2:]) < MS_SSIM_SIDE:
        return None
    return float(piq.multi_scale_ssim(a, b, data_range=1.0))


def gmsd(a: Tensor, b: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue 2014) of the luma; (1, 3, H, W) in [0, 1]."""
    return float(piq.gmsd(a, b, data_range=1.0))


def read_state(file: Path) -> dict[str, Tensor]:
    """Named tensors of a `.safetensors` or a PyTorch file; `WeightsError` where it is neither."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
        reason = str(e).partition("\n")[0]
        raise WeightsError(f"{file}: not readable as weights: {reason}") from e
    if not isinstance(state, dict):
        raise WeightsError(f"{file}: no dictionary of tensors")
    return state


class Lpips:
    """LPIPS v0.1 (Zhang 2018), by the package `lpips`, which brings its linear layers along."""

    def __init__(self, backbone: Literal["alex", "vgg"], weights: Path | None = None) -> None:
        """`weights`: under the package's names, or torchvision's file of the bare backbone.

        Without, the package downloads them. Raises `WeightsError` where they do not fit.
        """
        import lpips  # type: ignore[import-untyped]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it names options torchvision renamed
            known = weights is not None
            self.net: Any = lpips.LPIPS(net=backbone, pnet_rand=known, verbose=False)
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
            bare = {k.removeprefix("features."): v for k, v in state.items()}
            state = {by_layer[k]: v for k, v in bare.items() if k in by_layer}
        try:
            missing, unexpected = self.net.load_state_dict(state, strict=False)
        except RuntimeError as e:
            raise WeightsError(f"{file}: tensors of other shapes than this LPIPS has") from e
        if unexpected or any(name.startswith("net.") for name in missing):
            raise WeightsError(f"{file}: not the weights of this LPIPS")


class LpipsAlex(Lpips):
    """LPIPS with AlexNet; also lends its backbone to the kernel distance."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__("alex", weights)

    def conv5(self, pictures: Tensor) -> Tensor:
        """`pictures` (B, 3, H, W) in [0, 1] -> rectified conv5, averaged over space (B, 256)."""
        with torch.inference_mode():
            maps: Tensor = self.net.net(self.net.scaling_layer(2 * pictures - 1)).relu5
            return maps.mean((2, 3))
