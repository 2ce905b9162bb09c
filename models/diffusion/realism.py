"""The lowest band is the codec's; realism is how far the rest is the drawn picture's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tiers import check_realism


def high_pass(r: Tensor) -> Tensor:
    """`r` (B, C, H, W), sides multiples of 16 -> `r` without its lowest band.

    The band is what block means of 16 pixels, blurred once and interpolated back, show. It belongs
    to the codec's picture: a decoder that leaves it alone cannot shift colours.
    """
    coarse = F.avg_pool2d(r, 16)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=r.device, dtype=r.dtype)
    weight = (kernel[:, None] * kernel)[None, None].expand(r.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), weight, groups=r.shape[1])
    band = F.interpolate(blurred, size=r.shape[2:], mode="bilinear", align_corners=False)
    return r - band


def mix(x_hat: Tensor, x: Tensor, alpha: float) -> Tensor:
    """The picture at realism `alpha` between the codec's `x_hat` (0) and the drawn `x` (1).

    Shapes are equal, any. The straight way between the two is the optimal one (Freirich 2021, eq.
    11), and holds per frequency: the lowest band of a residual decoder's picture is the codec's
    already, so that no realism shifts a colour. The network is not run. Raises `ParameterError` for
    other alphas, `ValueError` for other shapes.
    """
    check_realism(alpha)
    if x_hat.shape != x.shape:
        raise ValueError(f"pictures of {tuple(x_hat.shape)} and {tuple(x.shape)} do not mix")
    return torch.lerp(x_hat, x, alpha)
