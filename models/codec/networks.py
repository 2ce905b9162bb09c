"""The networks of the architectures in `models.codec.architectures`, with CompressAI's names.

The names of parameters are those of CompressAI, so that its checkpoints load unchanged. The entropy
models are not part of the networks: they are used through their tables (`models.codec.tables`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec.architectures import Architecture, Blocks
from models.codec.msh import GDN, conv, deconv, hyper_analysis, hyper_synthesis, strided


class Network(nn.Module):
    """The transforms of one architecture with `N` hidden and `M` latent channels.

    - `g_a`: x (B, 3, H, W) in [0, 1] -> y (B, M, H/16, W/16)
    - `g_s`: y_hat -> x_hat (B, 3, H, W)
    - `h_a`, unless the prior is factorized: y (its absolute values if the prior has scales only)
      -> z (B, N, H/64, W/64)
    - `h_s`: z_hat -> scales (B, M, H/16, W/16), scales and means (B, 2M, H/16, W/16), or with a
      context model as many features
    - `context_prediction` and `entropy_parameters`, with a context model: y_hat decoded so far
      -> (B, 2M, H/16, W/16); this after the features of `h_s` (B, 4M, …) -> scales and means
    """

    def __init__(self, architecture: Architecture, N: int, M: int) -> None:
        super().__init__()
        self.architecture, self.N, self.M = architecture, N, M
        self.g_a, self.g_s = _TRANSFORMS[architecture.blocks](N, M)
        prior = architecture.prior
        if prior == "factorized":
            return
        if architecture.blocks in ("residual", "attention"):
            self.h_a, self.h_s = _residual_hyper(N)
        elif prior == "scale":
            self.h_a = hyper_analysis(N, M, nn.ReLU)
            self.h_s = nn.Sequential(
                deconv(N, N), nn.ReLU(), deconv(N, N), nn.ReLU(), conv(N, M, 3, 1), nn.ReLU()
            )
        else:
            self.h_a, self.h_s = hyper_analysis(N, M, nn.LeakyReLU), hyper_synthesis(N, M)
        if prior == "context":
            self.context_prediction = nn.Conv2d(M, 2 * M, 5, padding=2)
            self.entropy_parameters = nn.Sequential(
                nn.Conv2d(4 * M, M * 10 // 3, 1), nn.LeakyReLU(),
                nn.Conv2d(M * 10 // 3, M * 8 // 3, 1), nn.LeakyReLU(),
                nn.Conv2d(M * 8 // 3, 2 * M, 1),
            )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, to whose result the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3, 1)
        self.conv2 = conv(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        # without a name, the result of conv1 is freed before the sum
        out = self.conv2(F.leaky_relu(self.conv1(x), inplace=True))
        return F.leaky_relu(out, inplace=True) + x


class ResidualBlockWithStride(nn.Module):
    """Halve both sides: two 3×3 convolutions and a GDN, and a 1×1 convolution beside them."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1 = conv(i, o, 3, 2)
        self.conv2 = conv(o, o, 3, 1)
        self.gdn = GDN(o)
        self.skip = conv(i, o, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gdn(self.conv2(F.leaky_relu(self.conv1(x), inplace=True)))
        return out.add(self.skip(x))


class ResidualBlockUpsample(nn.Module):
    """Double both sides: two 3×3 convolutions and an inverse GDN, and a third beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.subpel_conv = subpel_conv(channels, channels)
        self.conv = conv(channels, channels, 3, 1)
        self.igdn = GDN(channels, inverse=True)
        self.upsample = subpel_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.igdn(self.conv(F.leaky_relu(self.subpel_conv(x), inplace=True)))
        return out.add(self.upsample(x))


class ResidualUnit(nn.Module):
    """A 3×3 convolution with half the channels between two 1×1, to whose result x is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv = nn.Sequential(
            conv(channels, half, 1, 1), nn.ReLU(), conv(half, half, 3, 1), nn.ReLU(),
            conv(half, channels, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class AttentionBlock(nn.Module):
    """x + a sigmoid(b), where a and b are each three residual units of x.

    All its convolutions are local: a position depends on the 7×7 positions around it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Sequential(*(ResidualUnit(channels) for _ in range(3)))
        self.conv_b = nn.Sequential(
            *(ResidualUnit(channels) for _ in range(3)), conv(channels, channels, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_a(x) * torch.sigmoid(self.conv_b(x))
        return out + x


def subpel_conv(i: int, o: int) -> nn.Sequential:
    """Double both sides: a 3×3 convolution to four times the channels, and a pixel shuffle."""
    return nn.Sequential(conv(i, 4 * o, 3, 1), nn.PixelShuffle(2))


def _gdn(N: int, M: int) -> tuple[nn.Sequential, nn.Sequential]:
    return strided(N, M, lambda: GDN(N), lambda: GDN(N, inverse=True))


def _relu(N: int, M: int) -> tuple[nn.Sequential, nn.Sequential]:
    return strided(N, M, nn.ReLU, nn.ReLU)


def _residual(N: int, M: int) -> tuple[nn.Sequential, nn.Sequential]:
    g_a = nn.Sequential(
        ResidualBlockWithStride(3, N), ResidualBlock(N),
        ResidualBlockWithStride(N, N), ResidualBlock(N),
        ResidualBlockWithStride(N, N), ResidualBlock(N), conv(N, M, 3, 2),
    )  # fmt: skip
    g_s = nn.Sequential(
        ResidualBlock(M), ResidualBlockUpsample(N), ResidualBlock(N), ResidualBlockUpsample(N),
        ResidualBlock(N), ResidualBlockUpsample(N), ResidualBlock(N), subpel_conv(N, 3),
    )  # fmt: skip
    return g_a, g_s


def _attention(N: int, M: int) -> tuple[nn.Sequential, nn.Sequential]:
    g_a, g_s = _residual(N, M)
    g_a.insert(3, AttentionBlock(N))
    g_a.append(AttentionBlock(M))
    g_s.insert(4, AttentionBlock(N))
    g_s.insert(0, AttentionBlock(M))
    return g_a, g_s


def _residual_hyper(N: int) -> tuple[nn.Sequential, nn.Sequential]:
    wide = N * 3 // 2
    h_a = nn.Sequential(
        conv(N, N, 3, 1), nn.LeakyReLU(), conv(N, N, 3, 1), nn.LeakyReLU(), conv(N, N, 3, 2),
        nn.LeakyReLU(), conv(N, N, 3, 1), nn.LeakyReLU(), conv(N, N, 3, 2),
    )  # fmt: skip
    h_s = nn.Sequential(
        conv(N, N, 3, 1), nn.LeakyReLU(), subpel_conv(N, N), nn.LeakyReLU(), conv(N, wide, 3, 1),
        nn.LeakyReLU(), subpel_conv(wide, wide), nn.LeakyReLU(), conv(wide, 2 * N, 3, 1),
    )  # fmt: skip
    return h_a, h_s


_TRANSFORMS: dict[Blocks, Callable[[int, int], tuple[nn.Sequential, nn.Sequential]]] = {
    "gdn": _gdn,
    "relu": _relu,
    "residual": _residual,
    "attention": _attention,
}
