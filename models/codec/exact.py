"""The `exact` profile's `h_s`: scale indexes and means that are the same on every machine."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.codec import rans

BITS = 16
"""Fraction bits of weights and activations."""
SLOPE = 655
"""Leaky slope in 2^-16: 655 / 65536 = 0.009995, for LeakyReLU's 0.01."""
STRIP = 2048
"""Positions that a layer reads at a time: torch unfolds them, about 0.1 GB meanwhile."""


class ExactHyperSynthesis:
    """`h_s` in integers: weights and activations in units of 2^-16, held in float64.

    Every product sum is an integer below 2^53 and thus exact in whatever order it is taken; a
    layer's result is shifted back with a floor. A saturation keeps activations within 2^11, so
    that the bound holds for any `z` whatever. Where a layer's sums could pass it, its weights are
    halved, and the layer before hands it activations twice as large, as often as is needed.
    """

    LIMIT = float(1 << (BITS + 11))

    def __init__(self, h_s: nn.Sequential, M: int, scale_table: Tensor) -> None:
        """Raises `ValueError` where the weights are too large for the bound."""
        self.M = M
        self.layers = copy.deepcopy(h_s).double().requires_grad_(False)
        factor = 1.0  # of the activations that a layer hands on
        for layer in reversed(self.layers):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                factor = self._fix(layer, factor)
        if factor != 1:
            raise ValueError("these hyperprior weights are too large for exact sums")
        self.thresholds = torch.floor(scale_table[:-1].double() * (1 << BITS))

    def _fix(self, layer: nn.Conv2d | nn.ConvTranspose2d, factor: float) -> float:
        """Make a layer's weights integers, its results `factor` times as large.

        Returns the factor by which what it reads has to be larger.
        """
        one = float(1 << BITS)
        assert layer.bias is not None
        layer.bias.mul_(factor * one**2).round_()
        room = 2.0**53 - float(layer.bias.abs().max())
        outputs = (0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else (1, 2, 3)
        more = 1.0
        while more <= self.LIMIT:
            weight = (layer.weight * (factor * one / more)).round()
            if float(weight.abs().sum(outputs).max()) * self.LIMIT < room:
                layer.weight.copy_(weight)
                return more
            more *= 2
        raise ValueError("these hyperprior weights are too large for exact sums")

    def __call__(self, z_symbols: Tensor, medians: Tensor) -> tuple[rans.Int32Array, Tensor]:
        """`z` symbols (B, N, h, w) -> contexts (M, 4h, 4w) int32 of the first, all means, float32.

        The means are (B, M, 4h, 4w).
        """
        one = float(1 << BITS)
        x = z_symbols.double() * one + torch.round(medians.double() * one)
        x = x.clamp(-self.LIMIT, self.LIMIT)
        *first, last = self.layers
        for layer in first:
            if isinstance(layer, nn.LeakyReLU):
                x = torch.where(x < 0, torch.floor(x * SLOPE / one), x)
            else:
                x = torch.cat(list(self._strips(layer, x)), 2)
        means = torch.empty(len(x), self.M, *x.shape[2:])
        indexes = torch.empty_like(means, dtype=torch.int32)
        top = 0
        for made in self._strips(last, x):
            rows = slice(top, top := top + made.shape[2])
            scales_hat, means_hat = made.chunk(2, 1)
            scales_hat = scales_hat.contiguous()  # else `bucketize` warns
            indexes[:, :, rows] = torch.bucketize(scales_hat, self.thresholds, out_int32=True)
            # within ±2^11 and rounded to 2^-12: float32 holds the means exactly
            means[:, :, rows] = (torch.floor(means_hat / 16 + 0.5) / 4096).float()
        return indexes[0].numpy(), means

    def _strips(self, layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
        """A layer's result in strips of rows, from the top."""
        scale = 2 if isinstance(layer, nn.ConvTranspose2d) else 1
        rows = x.shape[2]
        height = max(STRIP // x.shape[3], 1)
        for top in range(0, rows, height):
            bottom, first = min(top + height, rows), max(top - 1, 0)
            made = layer(x[:, :, first : bottom + 1])  # a kernel reaches one row further
            kept = made[:, :, scale * (top - first) :][:, :, : scale * (bottom - top)]
            yield torch.floor(kept / (1 << BITS)).clamp_(-self.LIMIT, self.LIMIT)
