"""The codec's rate: differentiable densities of the latents y and z (Ballé 2018, Minnen 2018)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE_MIN = 0.11
"""Lower bound of a latent's scale, the first entry of the decoder's scale table."""
SCALE_TABLE = torch.linspace(math.log(SCALE_MIN), math.log(256), 64).exp()
"""Scales for which the entropy decoder has tables (CompressAI's)."""
LIKELIHOOD_MIN = 1e-9
"""Lower bound of a symbol's probability in training: no symbol costs more than 30 bits."""
TAIL = 1e-9
"""Total probability of z outside the first and last quantile."""


class LowerBound(torch.autograd.Function):
    """max(x, bound). Below the bound, only gradients that make x larger are passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ((x >= ctx.bound) | (grads[0] < 0)), None


class EntropyBottleneck(nn.Module):
    """Fully factorised density of z (Ballé 2018, appendix 6.1), with CompressAI's parameter names.

    `quantiles` (C, 1, 3) hold the lower tail, median and upper tail of each channel. They are not
    trained: `update_quantiles` computes them from the density. z is rounded around the median.
    """

    def __init__(self, channels: int, spread: float = 10.0) -> None:
        super().__init__()
        widths = (1, 3, 3, 3, 3, 1)
        scale = spread ** (1 / (len(widths) - 1))
        self.matrices, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(widths[:-1], widths[1:], strict=True):
            start = math.log(math.expm1(1 / scale / o))
            self.matrices.append(nn.Parameter(torch.full((channels, o, i), start)))
            self.biases.append(nn.Parameter(torch.empty(channels, o, 1).uniform_(-0.5, 0.5)))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.zeros(channels, o, 1)) for o in widths[1:-1]
        )
        quantiles = torch.tensor([-spread, 0.0, spread]).repeat(channels, 1, 1)
        self.quantiles = nn.Parameter(quantiles, requires_grad=False)

    @property
    def medians(self) -> Tensor:
        """Medians of the channels, (1, C, 1, 1)."""
        return self.quantiles[None, :, 0, 1, None, None]

    def likelihood(self, z: Tensor) -> Tensor:
        """`z` (B, C, h, w) -> probability of the unit interval around each value, (C, 1, B h w)."""
        v = z.transpose(0, 1).reshape(z.shape[1], 1, -1)
        p = torch.sigmoid(self._logits(v + 0.5)) - torch.sigmoid(self._logits(v - 0.5))
        return lower_bound(p, LIKELIHOOD_MIN)

    @torch.no_grad()
    def update_quantiles(self) -> None:
        """Compute the quantiles of the current density by bisection."""
        logit = math.log(2 / TAIL - 1)
        target = torch.tensor([-logit, 0.0, logit], device=self.quantiles.device)
        low, high = (torch.full_like(self.quantiles, end) for end in (-1e4, 1e4))
        for _ in range(50):
            middle = (low + high) / 2
            below = self._logits(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.quantiles.copy_((low + high) / 2)

    def _logits(self, x: Tensor) -> Tensor:
        """Logits of the cumulative distribution at `x` (C, 1, n)."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            x = F.softplus(matrix) @ x + bias
            if i < len(self.factors):
                x = x + torch.tanh(self.factors[i]) * torch.tanh(x)
        return x


def gaussian_likelihood(y: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """Gaussian probability of the unit interval around each entry of `y`."""
    s = lower_bound(scales, SCALE_MIN) * math.sqrt(2)
    v = (y - means).abs()
    p = 0.5 * (torch.erfc((v - 0.5) / s) - torch.erfc((v + 0.5) / s))
    return lower_bound(p, LIKELIHOOD_MIN)


def table_scales(scales: Tensor) -> Tensor:
    """Round each scale up to the next entry of the decoder's scale table."""
    table = SCALE_TABLE.to(scales.device)
    return table[torch.bucketize(scales.contiguous(), table[:-1])]


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """Apply `LowerBound`."""
    out: Tensor = LowerBound.apply(x, bound)
    return out


def round_straight_through(x: Tensor, offset: Tensor) -> Tensor:
    """Round `x - offset` and add `offset` again; the gradient is that of the identity."""
    return x + (torch.round(x - offset) + offset - x).detach()


def add_noise(x: Tensor) -> Tensor:
    """Add uniform noise in [-0.5, 0.5), the differentiable stand-in for rounding."""
    return x + torch.empty_like(x).uniform_(-0.5, 0.5)
