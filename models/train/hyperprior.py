"""The mean-scale hyperprior for training: transforms and densities in one network."""

import torch
from torch import Tensor

from models.codec.msh import GDN, MeanScaleHyperprior
from models.train.entropy import (
    EntropyBottleneck,
    add_noise,
    gaussian_likelihood,
    round_straight_through,
    table_scales,
)

MARGIN = 1 + 2.0**-10
"""`project` moves GDN's parameters to this multiple of their lower bounds."""


class TrainableHyperprior(MeanScaleHyperprior):
    """The four transforms and the densities of y and z; computes rate and reconstruction."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.entropy_bottleneck = EntropyBottleneck(N)

    def forward(
        self, x: Tensor, bf16: bool = False, prior_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`x` (B, 3, H, W), sides multiples of 64 -> (bits of the whole batch, x_hat).

        In training mode the rate is computed with uniform noise in place of rounding, and x_hat
        with rounding whose gradient is passed straight through (Minnen 2020). In evaluation mode
        the rate is that of the decoder's scale table. With `prior_only` the transforms get no
        gradient, and None is returned in place of x_hat.
        """
        # latents reach ±60, where bfloat16 is coarser than the quantiser's step: keep float32 there
        cast = torch.autocast(x.device.type, torch.bfloat16, enabled=bf16)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior_only):
            with cast:
                a = self.g_a[:6](x)
            y = self.g_a[6](a.float())
        z = self.h_a(y)
        z_hat = round_straight_through(z, self.entropy_bottleneck.medians)
        scales_hat, means_hat = self.h_s(z_hat).chunk(2, 1)
        y_hat = round_straight_through(y, means_hat)
        if not self.training:
            scales_hat = table_scales(scales_hat)
        p_z = self.entropy_bottleneck.likelihood(add_noise(z) if self.training else z_hat)
        p_y = gaussian_likelihood(add_noise(y) if self.training else y_hat, scales_hat, means_hat)
        bits = -(p_y.log2().sum() + p_z.log2().sum())
        if prior_only:
            return bits, None
        s = self.g_s[0](y_hat)
        with cast:
            x_hat = self.g_s[1:](s)
        return bits, x_hat.float()

    @torch.no_grad()
    def rescale(self, k: float) -> None:
        """Multiply the latents y by `k` and divide the weights that read them: same x_hat."""
        tensors = self.state_dict()
        for name in ("g_a.6.weight", "g_a.6.bias", "h_s.4.weight", "h_s.4.bias"):
            tensors[name].mul_(k)
        for name in ("g_s.0.weight", "h_a.0.weight"):
            tensors[name].div_(k)

    @torch.no_grad()
    def project(self) -> None:
        """Move GDN's parameters to just above their lower bounds, below which gradients vanish."""
        for layer in self.modules():
            if isinstance(layer, GDN):
                layer.beta.clamp_(min=MARGIN * (layer.BETA_MIN + layer.PEDESTAL) ** 0.5)
                layer.gamma.clamp_(min=MARGIN * layer.PEDESTAL**0.5)
