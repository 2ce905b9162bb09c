"""Entropy coding of latents whose means and scales depend on the symbols before (a context model).

Position by position, in the order of rows, a masked 5×5 convolution of the latents decoded so far
and the features of `h_s` give the means and scales of all channels (Minnen 2018). If one scale
index differs from the encoder's, everything after it decodes wrongly. Therefore all sums are
rounded as CompressAI rounds them in a process with the same settings, but without its overhead:
each call of a torch convolution with a 5×5 kernel rearranges the kernel, which takes longer than
the convolution.
The kernels used instead are compared with torch's convolutions, bit by bit, before they are used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models import cancellation
from models.codec import rans, tables
from models.codec.compiled import compiled

SIZE, PAD, TAPS = 5, 2, 12
"""Side of the context's kernel, its margin, and the number of taps before its centre."""
TRIALS = 4
"""Random positions at which a kernel must give torch's bits in all sums to be used."""
CHECK = 64
"""Positions, about 0.1 s of work, between two checks of whether somebody still wants the result."""
SLOPE = 0.01
"""Slope of LeakyReLU below 0, PyTorch's default."""

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Order:
    """Order in which a convolution of oneDNN sums: over the blocks of `block` channels, in each
    over the taps, and for each tap over the channels of the block.

    `separate`: each block is summed from zero and then added to the sum of the blocks before it.
    """

    block: int
    separate: bool


ORDERS = Order(8, separate=False), Order(16, separate=True)
"""Those of oneDNN with AVX2 and with AVX-512."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Symbols, scale indexes and means of all positions, each (h, w, M)."""

    symbols: rans.Int32Array
    indexes: rans.Int32Array
    means: Float32Array


class ContextModel:
    """The layers after `h_s` that give means and scales of `M` latent channels."""

    def __init__(
        self, context_prediction: nn.Conv2d, entropy_parameters: nn.Sequential, scale_table: Tensor
    ) -> None:
        weight, bias = context_prediction.weight.detach(), context_prediction.bias
        assert bias is not None
        mask = (torch.arange(SIZE**2) < TAPS).reshape(SIZE, SIZE)
        self.M = weight.shape[1]
        self.context = weight * mask, bias.detach()  # (2M, M, 5, 5), (2M,)
        self.layers = [
            (layer.weight.detach().flatten(1), layer.bias.detach())  # (o, i), (o,)
            for layer in entropy_parameters
            if isinstance(layer, nn.Conv2d) and layer.bias is not None
        ]
        self.thresholds = scale_table[:-1].numpy()
        self._kernels: dict[tuple[int, bool], tuple[Order | None, bool]] = {}

    def decode(
        self,
        y_string: bytes,
        features: Tensor,
        tables: rans.Tables,
        dtype: torch.dtype = torch.float32,
    ) -> Positions:
        """Decode a y string, given the features (1, 2M, h, w) that `h_s` computed.

        `dtype` is that of the sums. Raises `CorruptStream`, `DesynchronisedStream` or `Canceled`.
        """
        decoder = rans.Decoder(y_string, tables)
        walk = _Walk(self, features, dtype)
        for i in walk.positions():
            decoder.read(walk.contexts(i), walk.symbols[i])
            walk.fill(i)
        decoder.close()
        return walk.result()

    def quantize(
        self, y: Tensor, features: Tensor, dtype: torch.dtype = torch.float32
    ) -> Positions:
        """Round y (1, M, h, w) to symbols, given the features (1, 2M, h, w) of `h_s`.

        Raises `Canceled`.
        """
        walk = _Walk(self, features, dtype)
        latents = y[0].flatten(1).numpy()
        for i in walk.positions():
            walk.contexts(i)
            walk.symbols[i] = np.rint(latents[:, i] - walk.means)
            walk.fill(i)
        return walk.result()

    def kernels(self) -> tuple[Order | None, bool]:
        """Return the kernels that give torch's bits with the current settings of the process.

        The first is the order of the context's convolution, or None for torch's own convolution.
        The second is True if the layers after it may be products of matrix and vector.
        """
        key = torch.get_num_threads(), bool(torch.backends.mkldnn.enabled)
        if key not in self._kernels:
            orders = (o for o in ORDERS if self.M % o.block == 0 and self._agrees(o, False))
            self._kernels[key] = next(orders, None), self._agrees(None, True)
        return self._kernels[key]

    def blocked(self, block: int) -> Float32Array:
        """Return the context's weights in the order of summation, (M / block, 12, block, 2M)."""
        if block not in self._blocked:
            w = self.context[0].flatten(2)[:, :, :TAPS]
            w = w.reshape(len(w), -1, block, TAPS).permute(1, 3, 2, 0)
            self._blocked[block] = w.contiguous().numpy()
        return self._blocked[block]

    @cached_property
    def _blocked(self) -> dict[int, Float32Array]:
        return {}

    def _agrees(self, order: Order | None, products: bool) -> bool:
        """Compare kernels with torch's convolutions at random positions."""
        rng = np.random.default_rng(0)
        ours = _Sums(self, torch.float32, order, products)
        theirs = _Sums(self, torch.float32, None, False)
        for _ in range(TRIALS):
            y_hat = rng.normal(0, 3, (PAD + 1, SIZE, self.M)).astype(np.float32)
            features = rng.normal(0, 1, 2 * self.M).astype(np.float32)
            for sums in (ours, theirs):
                sums.run(features, y_hat, 0, 0)
            if not np.array_equal(ours.output, theirs.output):
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what depends on the settings of the process, or can be computed again."""
        state = self.__dict__ | {"_kernels": {}}
        state.pop("_blocked", None)
        return state


def warm_up() -> None:
    """Compile the kernels, with a small random network, unless they are in numba's cache."""
    M = max(order.block for order in ORDERS)
    layers = nn.Sequential(nn.Conv2d(4 * M, 2 * M, 1))
    model = ContextModel(nn.Conv2d(M, 2 * M, SIZE), layers, tables.scale_table())
    model.quantize(torch.zeros(1, M, 1, 1), torch.zeros(1, 2 * M, 1, 1))


class _Walk:
    """A decoder or an encoder on its way through all positions.

    For each of `positions`, `contexts` is called, then this row of `symbols` is set, then `fill` is
    called.
    """

    def __init__(self, model: ContextModel, features: Tensor, dtype: torch.dtype) -> None:
        M, (rows, self.columns) = model.M, features.shape[2:]
        kernels = model.kernels() if dtype == torch.float32 else (None, True)
        self.sums = _Sums(model, dtype, *kernels)
        self.means = self.sums.output[M:]
        self.thresholds = model.thresholds
        self.features = features[0].flatten(1).numpy()  # (2M, h w)
        self.y_hat = np.zeros((rows + PAD, self.columns + 2 * PAD, M), np.float32)
        self.symbols = np.empty((rows * self.columns, M), np.int32)
        self.indexes = np.empty_like(self.symbols)
        self.all_means = np.empty(self.symbols.shape, np.float32)

    def positions(self) -> Iterator[int]:
        """Yield all positions. Raises `Canceled` once the work of this thread is canceled."""
        for i in range(len(self.symbols)):
            if i % CHECK == 0:
                cancellation.check()
            yield i

    def contexts(self, i: int) -> rans.Int32Array:
        """Compute the means and scales of position `i`; return the scale indexes, (M,)."""
        self.sums.run(self.features[:, i], self.y_hat, *divmod(i, self.columns))
        _scale_indexes(self.sums.output, self.thresholds, self.indexes[i])
        contexts: rans.Int32Array = self.indexes[i]
        return contexts

    def fill(self, i: int) -> None:
        """Add the means of position `i` to its symbols."""
        row, column = divmod(i, self.columns)
        self.all_means[i] = self.means
        y_hat = self.y_hat[row + PAD, column + PAD]
        y_hat[:] = self.symbols[i]
        y_hat += self.means

    def result(self) -> Positions:
        """Return what was computed."""
        shape = -1, self.columns, len(self.means)
        symbols, indexes = self.symbols.reshape(shape), self.indexes.reshape(shape)
        return Positions(symbols, indexes, self.all_means.reshape(shape))


class _Sums:
    """The sums of one position, in buffers that are allocated once."""

    def __init__(
        self, model: ContextModel, dtype: torch.dtype, order: Order | None, products: bool
    ) -> None:
        """Choose the kernels: see `ContextModel.kernels`. With float64 all are products."""
        weight, bias = model.context
        self.dtype, self.products = dtype, products
        self.order = order
        self.weights = model.blocked(order.block) if order else None
        self.bias = bias.numpy()
        self.context = weight.to(dtype), bias.to(dtype)
        self.layers = [(w.to(dtype), b.to(dtype)) for w, b in model.layers]
        self.crop = np.zeros((model.M, SIZE**2), np.float32)
        self.before = np.empty(4 * model.M, np.float32)  # the features, and the context after them
        self.inputs = torch.from_numpy(self.before)
        self.outputs = [torch.empty(len(w), dtype=dtype) for w, _ in self.layers]
        self.output = np.empty(2 * model.M, np.float32)

    def run(self, features: Float32Array, y_hat: Float32Array, row: int, column: int) -> None:
        """Compute `output`, scales and then means, (2M,), of a position.

        `features` (2M,) are those of `h_s` at the position, `y_hat` (h + 2, w + 4, M) the latents
        with a margin of zeros, which reach to the position at least.
        """
        half = len(features)
        self.before[:half] = features
        if self.order is None:
            _crop(y_hat, row, column, self.crop)
            self.before[half:] = self._convolved()
        else:
            _convolve(
                y_hat, row, column, self.weights, self.bias, self.order.separate, self.before[half:]
            )
        x = self.inputs.to(self.dtype)
        last = len(self.layers) - 1
        for i, (weight, bias) in enumerate(self.layers):
            if self.products:
                x = torch.addmv(bias, weight, x, out=self.outputs[i])
            else:
                x = F.conv2d(x.view(1, -1, 1, 1), weight[:, :, None, None], bias).view(-1)
            if i < last:
                F.leaky_relu_(x, SLOPE)
        self.output[:] = x.numpy()

    def _convolved(self) -> Float32Array:
        weight, bias = self.context
        crop = torch.from_numpy(self.crop).to(self.dtype)
        if self.dtype == torch.float64:
            return torch.addmv(bias, weight.flatten(1), crop.flatten()).numpy()
        return F.conv2d(crop.view(1, -1, SIZE, SIZE), weight, bias).flatten().numpy()


@compiled(fastmath={"contract"})
def _convolve(y_hat, row, column, weights, bias, separate, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum up the context of a position by fused multiply-add; `separate` is that of `Order`."""
    sums = np.empty_like(out) if separate else out
    for o in range(out.size):
        out[o] = bias[o]
    for b in range(weights.shape[0]):
        if separate:
            sums[:] = 0
        for t in range(TAPS):
            y = y_hat[row + t // SIZE, column + t % SIZE]
            for k in range(weights.shape[2]):
                value, w = y[b * weights.shape[2] + k], weights[b, t, k]
                for o in range(out.size):
                    sums[o] += w[o] * value
        if separate:
            for o in range(out.size):
                out[o] += sums[o]


@compiled()
def _crop(y_hat, row, column, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Copy the latents under the kernel's taps to the first 12 of the 25 columns of `out`."""
    for c in range(out.shape[0]):
        for t in range(TAPS):
            out[c, t] = y_hat[row + t // SIZE, column + t % SIZE, c]


@compiled()
def _scale_indexes(scales, thresholds, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Find the first threshold that is not below each of the first `out.size` scales."""
    for c in range(out.size):
        low, high = 0, thresholds.size
        while low < high:
            middle = (low + high) >> 1
            if scales[c] <= thresholds[middle]:
                high = middle
            else:
                low = middle + 1
        out[c] = low
