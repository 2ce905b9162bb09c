"""Distances between pictures. LPIPS is the package `lpips`; its weights come from a local file."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of pictures in [0, 1]."""
    return float((a - b).square().mean())


def offset(a: Tensor, b: Tensor) -> float:
    """Largest difference of the channels' means, in 1/255. `a`, `b` (1, 3, H, W) in [0, 1]."""
    return float((a - b).mean((0, 2, 3)).abs().max()) * 255


class LpipsAlex:
    """LPIPS v0.1 with AlexNet (Zhang 2018)."""

    def __init__(self, weights: Path | None = None) -> None:
        """`weights`: safetensors under the package's names; without, the package downloads them."""
        import lpips  # type: ignore[import-untyped]

        if weights is None:
            self.net = lpips.LPIPS(net="alex", verbose=False)
        else:
            self.net = lpips.LPIPS(net="alex", pnet_rand=True, pretrained=False, verbose=False)
            # the package holds its linear layers twice, as `lin0` and as `lins.0`
            missing, unexpected = self.net.load_state_dict(load_file(weights), strict=False)
            if unexpected or any(not name.startswith("lins.") for name in missing):
                raise ValueError(f"{weights}: not the weights of LPIPS-Alex")
        self.net.eval()

    def __call__(self, a: Tensor, b: Tensor) -> float:
        """Distance of `a` and `b`, (1, 3, H, W) in [0, 1]."""
        with torch.inference_mode():
            return float(self.net(a, b, normalize=True))
