"""The CDF tables of the entropy coder, computed from a model's parameters as CompressAI does.

They equal those of CompressAI's `update()` in every integer, which existing bitstreams need. The
floats before rounding are therefore computed by the same torch operations on the same shapes.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.codec import rans
from models.codec.compiled import compiled

Z, Y = "entropy_bottleneck", "gaussian_conditional"
"""The parts of a state dict that hold tables. Without a hyperprior, the first one codes y."""
LAYERS = 5
"""Layers of the network for the cumulative distribution of the entropy bottleneck."""
TAIL_QUANTILE = 6.1094102048693975
"""-x with Φ(x) = 1e-9 / 2: beyond so many standard deviations, symbols are coded as escapes."""
MAX_LENGTH = 1 << 16
"""Longest CDF: each of its symbols has a frequency of at least 1 of 65536."""


def names(part: str) -> tuple[str, ...]:
    """Return the names of a part's tables in a state dict."""
    tables = [f"{part}.{name}" for name in ("_quantized_cdf", "_offset", "_cdf_length")]
    return (*tables, f"{part}.scale_table") if part == Y else tuple(tables)


def scale_table() -> Tensor:
    """Return the scales for which there are CDFs, (64,): logarithmic from 0.11 to 256."""
    return torch.exp(torch.linspace(math.log(0.11), math.log(256), 64))


def gaussian() -> dict[str, Tensor]:
    """Return the tables of the Gaussian conditional, with their names in a state dict."""
    scales = scale_table()
    center = torch.ceil(scales * TAIL_QUANTILE).int()
    length = 2 * center + 1
    samples = torch.abs(torch.arange(int(length.max())).int() - center[:, None]).float()
    upper = _normal_cdf((0.5 - samples) / scales[:, None])
    lower = _normal_cdf((-0.5 - samples) / scales[:, None])
    cdf = _cdfs(upper - lower, 2 * lower[:, :1], length)
    return dict(zip(names(Y), (cdf, -center, length + 2, scales), strict=True))


def factorized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tables of the entropy bottleneck, with their names in a state dict.

    `state` holds its parameters in float32. Raises `ValueError` if they give no CDFs.
    """
    quantiles = state[f"{Z}.quantiles"]
    medians = quantiles[:, 0, 1]
    minima = torch.ceil(medians - quantiles[:, 0, 0]).clamp(0, MAX_LENGTH).int()
    maxima = torch.ceil(quantiles[:, 0, 2] - medians).clamp(0, MAX_LENGTH).int()
    length = maxima + minima + 1
    if int(length.max()) >= MAX_LENGTH - 1:
        raise ValueError(f"the quantiles span {int(length.max())} values; too many for a CDF")
    samples = torch.arange(int(length.max())) + (medians - minima)[:, None, None]
    lower, upper = (_logits(state, samples + half) for half in (-0.5, 0.5))
    pmf = (torch.sigmoid(upper) - torch.sigmoid(lower))[:, 0]
    tail = torch.sigmoid(lower[:, 0, :1]) + torch.sigmoid(-upper[:, 0, -1:])
    return dict(zip(names(Z), (_cdfs(pmf, tail, length), -minima, length + 2), strict=True))


def quantized_cdf(pmf: NDArray[np.float32]) -> rans.Int32Array:
    """Return the CDF with 16 bits of the probabilities `pmf` (n,): (n + 1,), from 0 to 65536.

    Frequencies are rounded and scaled to the sum 65536. A symbol whose frequency would be 0 gets 1,
    which is taken from the symbol with the lowest frequency above 1. Raises `ValueError` if there
    is none, or if a probability is negative or not finite.
    """
    if not np.isfinite(pmf).all() or (pmf < 0).any():
        raise ValueError("a probability is negative or not finite")
    total = 1 << rans.PRECISION
    # half away from zero; float32 is exact here: the factor is a power of two
    frequencies = np.floor(pmf.astype(np.float64) * total + 0.5).astype(np.int64)
    if not (whole := int(frequencies.sum())):
        raise ValueError("all probabilities are 0")
    cdf = np.zeros(len(pmf) + 1, np.int64)
    np.cumsum(frequencies * total // whole, out=cdf[1:])
    cdf[-1] = total
    if not _fill(cdf):
        raise ValueError(f"{len(pmf)} symbols are too many for frequencies of 16 bits")
    return cdf.astype(np.int32)


@compiled()
def _fill(cdf):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Give each symbol a frequency of 1 or more; False if that is impossible."""
    n = cdf.size - 1
    for i in range(n):
        if cdf[i] != cdf[i + 1]:
            continue
        lowest, donor = np.int64(1 << 32), -1
        for j in range(n):
            frequency = cdf[j + 1] - cdf[j]
            if 1 < frequency < lowest:
                lowest, donor = frequency, j
        if donor < 0:
            return False
        first, last, step = (donor + 1, i, -1) if donor < i else (i + 1, donor, 1)
        for j in range(first, last + 1):  # assignments to slices take seconds to compile
            cdf[j] += step
    return True


def _cdfs(pmf: Tensor, tail: Tensor, length: Tensor) -> Tensor:
    """Return one CDF per row of `pmf` (n, L), of its first `length` (n,) values and its tail."""
    out = torch.zeros(len(pmf), int(length.max()) + 2, dtype=torch.int32)
    for i, size in enumerate(length.tolist()):
        row = quantized_cdf(torch.cat((pmf[i, :size], tail[i])).numpy())
        out[i, : len(row)] = torch.from_numpy(row)
    return out


def _logits(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits of the cumulative distribution at `x` (C, 1, n)."""
    for i in range(LAYERS):
        x = torch.matmul(F.softplus(state[f"{Z}.matrices.{i}"]), x) + state[f"{Z}.biases.{i}"]
        if i < LAYERS - 1:
            x = x + torch.tanh(state[f"{Z}.factors.{i}"]) * torch.tanh(x)
    return x


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-(2**-0.5) * x)
