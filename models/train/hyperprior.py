"""The mean-scale hyperprior as it is trained: transforms and densities in one network."""

import torch
from torch import Tensor

from models.codec.msh import GDN, MeanScaleHyperprior
from models.train.entropy import EntropyBottleneck, gaussian_likelihood, noisy, rounded, tabled

ABOVE = 1 + 2.0**-10


class Hyperprior(MeanScaleHyperprior):
    """The transforms and both densities, for training."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.entropy_bottleneck = EntropyBottleneck(N)

    def forward(
        self, x: Tensor, bf16: bool = False, prior_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`x` (B, 3, H, W), sides multiples of 64 -> bits of all, x_hat (None for `prior_only`).

        In training noise stands for rounding in the rate, and rounding passes gradients straight
        through for the picture (Minnen 2020); else bits are those of the decoder's scale table.
        `prior_only` leaves the transforms alone.
        """
        # latents reach ±60, where bfloat16 is coarser than the quantiser: wide layers only
        cast = torch.autocast(x.device.type, torch.bfloat16, enabled=bf16)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior_only):
            with cast:
                a = self.g_a[:6](x)
            y = self.g_a[6](a.float())
        z = self.h_a(y)
        z_hat = rounded(z, self.entropy_bottleneck.medians)
        scales_hat, means_hat = self.h_s(z_hat).chunk(2, 1)
        y_hat = rounded(y, means_hat)
        if not self.training:
            scales_hat = tabled(scales_hat)
        p_z = self.entropy_bottleneck.likelihood(noisy(z) if self.training else z_hat)
        p_y = gaussian_likelihood(noisy(y) if self.training else y_hat, scales_hat, means_hat)
        bits = -(p_y.log2().sum() + p_z.log2().sum())
        if prior_only:
            return bits, None
        s = self.g_s[0](y_hat)
        with cast:
            x_hat = self.g_s[1:](s)
        return bits, x_hat.float()

    @torch.no_grad()
    def rescale(self, k: float) -> None:
        """Make every latent `k` times as large, and undo it on the other side."""
        own = self.state_dict()
        for name in ("g_a.6.weight", "g_a.6.bias", "h_s.4.weight", "h_s.4.bias"):
            own[name].mul_(k)
        for name in ("g_s.0.weight", "h_a.0.weight"):
            own[name].div_(k)

    @torch.no_grad()
    def project(self) -> None:
        """GDN's parameters back to just above their bounds, where there still is a gradient."""
        for layer in self.modules():
            if isinstance(layer, GDN):
                layer.beta.clamp_(min=ABOVE * (layer.BETA_MIN + layer.PEDESTAL) ** 0.5)
                layer.gamma.clamp_(min=ABOVE * layer.PEDESTAL**0.5)
