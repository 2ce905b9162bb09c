"""The four transforms of the mean-scale hyperprior ("msh"; Minnen 2018; `mbt2018-mean`).

Parameters have CompressAI's names, so that its checkpoints load unchanged. The entropy models are
not part of this network: `models.codec.hyperprior` works from their CDF tables.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GDN(nn.Module):
    """Generalised divisive normalisation (Ballé 2016): x / sqrt(beta + gamma x²).

    The inverse multiplies instead of dividing. The parameters `beta` (C,) and `gamma` (C, C) hold
    sqrt(value + pedestal), as in CompressAI.
    """

    PEDESTAL = 2.0**-36
    BETA_MIN = 1e-6

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        # no arithmetic: on the meta device, it would import torch's compiler, which takes seconds
        self.beta = nn.Parameter(torch.full((channels,), (1 + self.PEDESTAL) ** 0.5))
        gamma = torch.full((channels, channels), self.PEDESTAL**0.5)
        self.gamma = nn.Parameter(gamma.fill_diagonal_((0.1 + self.PEDESTAL) ** 0.5))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return beta (C,) and gamma (C, C, 1, 1) of the formula, computed from the parameters."""
        beta = self.beta.clamp(min=(self.BETA_MIN + self.PEDESTAL) ** 0.5) ** 2 - self.PEDESTAL
        gamma = self.gamma.clamp(min=self.PEDESTAL**0.5) ** 2 - self.PEDESTAL
        return beta, gamma[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        beta, gamma = self.coefficients()
        norm = F.conv2d(x * x, gamma, beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


def conv(i: int, o: int, kernel: int = 5, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2)


def deconv(i: int, o: int, kernel: int = 5, stride: int = 2) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(i, o, kernel, stride, kernel // 2, stride - 1)


def strided(
    N: int, M: int, analysis: Callable[[], nn.Module], synthesis: Callable[[], nn.Module]
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return `g_a` and `g_s` of four 5×5 convolutions, with these activations between them."""
    g_a = nn.Sequential(
        conv(3, N), analysis(), conv(N, N), analysis(), conv(N, N), analysis(), conv(N, M)
    )
    g_s = nn.Sequential(
        deconv(M, N), synthesis(), deconv(N, N), synthesis(), deconv(N, N), synthesis(),
        deconv(N, 3),
    )  # fmt: skip
    return g_a, g_s


def hyper_analysis(N: int, M: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Return `h_a`: y (B, M, h, w) -> z (B, N, h/4, w/4)."""
    return nn.Sequential(conv(M, N, 3, 1), activation(), conv(N, N), activation(), conv(N, N))


def hyper_synthesis(N: int, M: int) -> nn.Sequential:
    """Return `h_s`: z_hat (B, N, h, w) -> scales and means (B, 2M, 4h, 4w)."""
    return nn.Sequential(
        deconv(N, M), nn.LeakyReLU(), deconv(M, M * 3 // 2), nn.LeakyReLU(),
        conv(M * 3 // 2, M * 2, 3, 1),
    )  # fmt: skip


class MeanScaleHyperprior(nn.Module):
    """The transforms, with `N` hidden and `M` latent channels (128 and 192 up to quality 4).

    - `g_a`: x (B, 3, H, W) in [0, 1] -> y (B, M, H/16, W/16)
    - `h_a`: y -> z (B, N, H/64, W/64)
    - `h_s`: z_hat -> scales and means (B, 2M, H/16, W/16)
    - `g_s`: y_hat -> x_hat (B, 3, H, W)
    """

    def __init__(self, N: int = 128, M: int = 192) -> None:
        super().__init__()
        self.N, self.M = N, M
        self.g_a, self.g_s = strided(N, M, lambda: GDN(N), lambda: GDN(N, inverse=True))
        self.h_a, self.h_s = hyper_analysis(N, M, nn.LeakyReLU), hyper_synthesis(N, M)
