"""The network `h_s` in integer arithmetic, for the `exact` profile.

It gives the same scale indexes and means on every machine.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from models import cancellation
from models.codec import idle_channels, rans
from models.codec.idle_channels import Convolution

BITS = 16
"""Fraction bits of weights and activations."""
SLOPE = 655
"""LeakyReLU's slope in units of 2^-16: 655 / 65536 = 0.009995, for the float network's 0.01."""
STRIP = 2048
"""Positions per call of a layer: torch copies the inputs of each (im2col), about 0.1 GB in all."""

TOO_LARGE = "the weights of h_s are too large for exact sums, which must stay below 2^53"


class ExactHyperSynthesis:
    """`h_s` in integer arithmetic: weights and activations in units of 2^-16, stored in float64.

    Every sum of products is an integer below 2^53, so float64 holds it exactly in any order of
    summation. A layer's result is divided by 2^16, rounded down and clamped to ±2^11, so the sums
    of the next layer stay below 2^53 for any z. If the sums of a layer could still exceed 2^53, its
    weights are divided by a power of two, and weights and biases of the layer before it are
    multiplied by the same factor, so that the result stays the same but for rounding. The first
    layer has no layer before it: weights that need a factor there are refused.
    """

    LIMIT = float(1 << (BITS + 11))

    def __init__(self, h_s: nn.Sequential, M: int, scale_table: Tensor) -> None:
        """Convert `h_s`. Raises `ValueError` if its weights are too large for exact sums."""
        self.M = M
        self.layers = copy.deepcopy(h_s).double().requires_grad_(False)
        factor = 1.0  # by which the activations after a layer are scaled
        for layer in reversed(self.layers):
            if isinstance(layer, Convolution):
                factor = self._to_fixed_point(layer, factor)
        if factor != 1:
            raise ValueError(TOO_LARGE)
        # only now, because the factors depend on all weights
        last = self.layers[-1]
        assert isinstance(last, Convolution)
        self.outputs = idle_channels.nonzero_channels(last)
        masks = idle_channels.used_channels(self.layers, self.outputs)
        self.inputs = masks[0]
        for number, (layer, i_o) in enumerate(zip(self.layers, pairwise(masks), strict=True)):
            if isinstance(layer, Convolution):
                self.layers[number] = idle_channels.narrow(layer, *i_o)
        self.thresholds = torch.floor(scale_table[:-1].double() * (1 << BITS))

    def _to_fixed_point(self, layer: Convolution, factor: float) -> float:
        """Convert a layer's weights to integers that scale its result by `factor`.

        Returns the factor by which the layer's input has to be scaled.
        """
        one = float(1 << BITS)
        assert layer.bias is not None
        layer.bias.mul_(factor * one**2).round_()
        room = 2.0**53 - float(layer.bias.abs().max())
        outputs = (0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else (1, 2, 3)
        input_factor = 1.0
        while input_factor <= self.LIMIT:
            weight = (layer.weight * (factor * one / input_factor)).round()
            if float(weight.abs().sum(outputs).max()) * self.LIMIT < room:
                layer.weight.copy_(weight)
                return input_factor
            input_factor *= 2
        raise ValueError(TOO_LARGE)

    def __call__(self, z_symbols: Tensor, medians: Tensor) -> tuple[rans.Int32Array, Tensor]:
        """Compute scale indexes and means from z symbols (B, N, h, w) and medians (1, N, 1, 1).

        Returns the indexes of the first picture, (M, 4h, 4w) int32, and the means of all pictures,
        (B, M, 4h, 4w) float32.
        """
        one = float(1 << BITS)
        z_symbols, medians = z_symbols[:, self.inputs], medians[:, self.inputs]
        x = z_symbols.double() * one + torch.round(medians.double() * one)
        x = x.clamp(-self.LIMIT, self.LIMIT)
        *first, last = self.layers
        for layer in first:
            if isinstance(layer, nn.LeakyReLU):
                for part in x.chunk(4, 1):  # the whole takes 0.4 GB more for 20 megapixels
                    part.copy_(torch.where(part < 0, torch.floor(part * SLOPE / one), part))
            else:
                x = self._apply(layer, x)
        means = torch.zeros(len(x), self.M, *x.shape[2:])
        indexes = torch.zeros_like(means, dtype=torch.int32)
        of_scales, of_means = (mask.nonzero()[:, 0] for mask in self.outputs.chunk(2))
        top = 0
        for strip in self._strips(last, x):
            rows = slice(top, top := top + strip.shape[2])
            scales_hat = strip[:, : len(of_scales)].contiguous()  # else `bucketize` warns
            means_hat = strip[:, len(of_scales) :]
            found = torch.bucketize(scales_hat, self.thresholds, out_int32=True)
            indexes[:, of_scales, rows] = found
            # float32 holds the means exactly: they lie within ±2^11 and are rounded to 2^-12
            means[:, of_means, rows] = (torch.floor(means_hat / 16 + 0.5) / 4096).float()
        return indexes[0].numpy(), means

    def _apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's result, computed in strips."""
        scale = 2 if isinstance(layer, nn.ConvTranspose2d) else 1
        out: Tensor | None = None
        top = 0
        for strip in self._strips(layer, x):
            if out is None:
                rows, columns = scale * x.shape[2], strip.shape[3]
                out = strip.new_empty(len(x), strip.shape[1], rows, columns)
            out[:, :, top : top + strip.shape[2]] = strip
            top += strip.shape[2]
        assert out is not None
        return out

    def _strips(self, layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
        """Yield a layer's result in strips of rows, from the top."""
        scale = 2 if isinstance(layer, nn.ConvTranspose2d) else 1
        rows = x.shape[2]
        height = max(STRIP // x.shape[3], 1)
        for top in range(0, rows, height):
            cancellation.check()
            bottom, first = min(top + height, rows), max(top - 1, 0)
            out = layer(x[:, :, first : bottom + 1])  # the kernel reads one more row on each side
            strip = out[:, :, scale * (top - first) :][:, :, : scale * (bottom - top)]
            yield torch.floor(strip / (1 << BITS)).clamp_(-self.LIMIT, self.LIMIT)
