"""Entropy coded strings to latents and back: the one place where `y_hat` comes from.

The hyperprior decides which CDF decodes which symbol, so encoder and decoder must agree on it to
the last bit. Two profiles: `float` computes `h_s` in float32 as CompressAI does on a CPU; `exact`
computes it in integers (held in float64, every sum below 2^53), so that the result cannot depend
on thread layout, backend or machine.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import rans, tiles
from models.bitstream import STRIDE_Z, padded
from models.errors import CorruptStream, DesynchronisedStream, LengthMismatch
from models.msh import MeanScaleHyperprior

EXACT_BITS = 16
"""Fraction bits of the `exact` profile's weights and activations."""
EXACT_SLOPE = 655
"""Leaky slope in 2^-16: 655 / 65536 = 0.009995, for LeakyReLU's 0.01."""
SCALE_MIN = 0.11
"""Lower bound of a latent's scale, the first entry of CompressAI's scale table."""


@dataclass(frozen=True, slots=True)
class Latents:
    """What entropy decoding yields.

    `symbols` (M, h, w) int32 are what was coded; `y_hat` (1, M, h, w) float32 is their sum with the
    means; `bits` (h, w) float32 is what each position cost, summed over channels.
    """

    y_hat: Tensor
    symbols: rans.Int32Array
    bits: NDArray[np.float32]


class Hyperprior:
    """Codes `y` and `z` with the tables of one set of weights."""

    def __init__(
        self,
        net: MeanScaleHyperprior,
        z_tables: rans.Tables,
        y_tables: rans.Tables,
        medians: Tensor,
        scale_table: Tensor,
    ) -> None:
        self.net = net
        self.z_tables = z_tables
        self.y_tables = y_tables
        self.medians = medians.reshape(1, -1, 1, 1)
        self.scale_table = scale_table
        self._exact = ExactHyperSynthesis(net.h_s, scale_table)

    def encode(self, x: Tensor, profile: str) -> tuple[bytes, bytes, Latents]:
        """`x` (1, 3, H, W) in [0, 1], sides multiples of 64 -> y string, z string, latents.

        Raises `ValueError` for other shapes.
        """
        if x.shape[0] != 1 or x.shape[2] % STRIDE_Z or x.shape[3] % STRIDE_Z:
            raise ValueError(f"{tuple(x.shape)}: one picture with sides that divide by {STRIDE_Z}")
        with torch.inference_mode():
            y = tiles.analyse(self.net.g_a, x, self.net.M)
            z = self.net.h_a(y)
            z_symbols = torch.round(z - self.medians)[0].to(torch.int32).numpy()
            z_string = rans.encode(z_symbols, _channels(z_symbols.shape), self.z_tables)
            indexes, means = self._prior(z_symbols, profile)
            symbols = torch.round(y - means)[0].to(torch.int32).numpy()
        y_string = rans.encode(symbols, indexes, self.y_tables)
        return y_string, z_string, self._latents(symbols, indexes, means)

    def decode(
        self, y_string: bytes, z_string: bytes, size: tuple[int, int], profile: str
    ) -> Latents:
        """Strings of a picture of padded `size` (H, W) -> latents.

        Raises `CorruptStream` or `DesynchronisedStream`, `LengthMismatch` for sizes that are no
        multiple of 64.
        """
        if size[0] % STRIDE_Z or size[1] % STRIDE_Z:
            raise LengthMismatch(f"padded size {size} is no multiple of {STRIDE_Z}")
        shape = (self.net.N, size[0] // STRIDE_Z, size[1] // STRIDE_Z)
        z_symbols = rans.decode(z_string, _channels(shape), self.z_tables)
        tries = ("exact",) if profile == "exact" else ("float", "float64")
        failure: CorruptStream | DesynchronisedStream | None = None
        for arithmetic in tries:
            with torch.inference_mode():
                indexes, means = self._prior(z_symbols, arithmetic)
            try:
                symbols = rans.decode(y_string, indexes, self.y_tables)
            except (CorruptStream, DesynchronisedStream) as e:  # out of step looks like either
                failure = failure or e
                continue
            return self._latents(symbols, indexes, means)
        assert failure is not None
        raise failure

    def _prior(self, z_symbols: rans.Int32Array, arithmetic: str) -> tuple[rans.Int32Array, Tensor]:
        """`z` symbols (N, h, w) -> contexts (M, 4h, 4w) and means (1, M, 4h, 4w)."""
        symbols = torch.from_numpy(z_symbols)[None]
        if arithmetic == "exact":
            return self._exact(symbols, self.medians)
        z_hat = symbols.float() + self.medians
        if arithmetic == "float64":
            h_s = _to_float64(self.net.h_s)
            scales_hat, means_hat = h_s(z_hat.double()).float().chunk(2, 1)
        else:
            scales_hat, means_hat = self.net.h_s(z_hat).chunk(2, 1)
        indexes = torch.bucketize(scales_hat.clamp(min=SCALE_MIN), self.scale_table[:-1])
        return indexes[0].to(torch.int32).numpy(), means_hat

    def _latents(
        self, symbols: rans.Int32Array, indexes: rans.Int32Array, means: Tensor
    ) -> Latents:
        y_hat = torch.from_numpy(symbols)[None].float() + means
        bits = rans.bits(symbols, indexes, self.y_tables).sum(0, dtype=np.float32)
        return Latents(y_hat, symbols, bits)


class ExactHyperSynthesis:
    """`h_s` in integers: weights and activations in units of 2^-16, held in float64.

    Every product sum is an integer below 2^53 and thus exact in whatever order it is taken; a
    layer's result is shifted back with a floor. A saturation keeps activations within 2^11, so
    that the bound holds for any `z` whatever.
    """

    LIMIT = float(1 << (EXACT_BITS + 11))

    def __init__(self, h_s: nn.Sequential, scale_table: Tensor) -> None:
        self.layers = _to_float64(h_s)
        one = 1 << EXACT_BITS
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.data.mul_(one).round_()
                assert layer.bias is not None
                layer.bias.data.mul_(float(one) ** 2).round_()
                transposed = isinstance(layer, nn.ConvTranspose2d)
                sums = layer.weight.abs().sum((0, 2, 3) if transposed else (1, 2, 3))
                worst = float(sums.max()) * self.LIMIT + float(layer.bias.abs().max())
                if worst >= 2.0**53:
                    raise ValueError("these hyperprior weights are too large for exact sums")
        self.thresholds = torch.floor(scale_table[:-1].double() * one)

    def __call__(self, z_symbols: Tensor, medians: Tensor) -> tuple[rans.Int32Array, Tensor]:
        """`z` symbols (1, N, h, w) -> contexts (M, 4h, 4w) int32, means (1, M, 4h, 4w) float32."""
        one = float(1 << EXACT_BITS)
        x = z_symbols.double() * one + torch.round(medians.double() * one)
        x = x.clamp(-self.LIMIT, self.LIMIT)
        for layer in self.layers:
            if isinstance(layer, nn.LeakyReLU):
                x = torch.where(x < 0, torch.floor(x * EXACT_SLOPE / one), x)
            else:
                x = torch.floor(layer(x) / one).clamp(-self.LIMIT, self.LIMIT)
        scales, means = x.chunk(2, 1)
        indexes = torch.bucketize(scales.contiguous(), self.thresholds)
        # within ±2^11 and rounded to 2^-12: float32 holds the means exactly
        means = torch.floor(means / 16 + 0.5) / 4096
        return indexes[0].to(torch.int32).numpy(), means.float()


def origin(height: int, width: int) -> tuple[int, int]:
    """Row and column at which the picture begins within its padded self."""
    full = padded(height, width)
    return (full[0] - height) // 2, (full[1] - width) // 2


def _channels(shape: tuple[int, ...]) -> rans.Int32Array:
    """Contexts of `z`: a symbol's context is its channel."""
    channel = np.arange(shape[0], dtype=np.int32)[:, None, None]
    return np.ascontiguousarray(np.broadcast_to(channel, shape))


def _to_float64(h_s: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(h_s).double().requires_grad_(False)
