"""Realism (alpha in code): how far the picture lies from the codec's to the diffusion decoder's.

The lowest frequencies, and with them the colours, always come from the codec.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tiers import check_realism


def high_pass(r: Tensor) -> Tensor:
    """Remove the lowest frequencies of `r` (B, C, H, W), whose sides are multiples of 16.

    These are the means of 16×16 blocks, blurred once and interpolated to the size of `r`. Residual
    decoders take this band from the codec's picture, so they cannot shift colours.
    """
    coarse = F.avg_pool2d(r, 16)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=r.device, dtype=r.dtype)
    weight = (kernel[:, None] * kernel)[None, None].expand(r.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), weight, groups=r.shape[1])
    band = F.interpolate(blurred, size=r.shape[2:], mode="bilinear", align_corners=False)
    return r - band


def mix(x_hat: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Interpolate between the codec's picture `x_hat` (alpha 0) and the decoder's `x` (alpha 1).

    Linear interpolation is the optimal trade-off between squared error and perception (Freirich
    2021, eq. 11), also at each frequency. Both pictures of a residual decoder share the lowest
    band, so no alpha shifts colours. Raises `ParameterError` unless alpha is in [0, 1], and
    `ValueError` if the shapes differ.
    """
    check_realism(alpha)
    if x_hat.shape != x.shape:
        raise ValueError(f"cannot mix pictures of shapes {tuple(x_hat.shape)} and {tuple(x.shape)}")
    return torch.lerp(x_hat, x, alpha)
