"""3×3 convolutions of many channels on a CPU, with fewer multiplications.

Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016, arXiv:1509.09308, section 4.3): a tile
of 6×6 inputs is transformed to 36 values, each is multiplied by a matrix (input channels, output
channels), and the 36 products are transformed to 4×4 outputs. That is 36 multiplications where the
convolution needs 144. The transforms cost a constant time per channel, so few channels gain
nothing. OpenVINO and oneDNN have no such convolution for float32 on x86.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec.inference_synthesis import (
    InferenceSynthesis,
    InverseGDN,
    ResidualSynthesis,
    SubPixel,
)

TILE = 4
"""Side of the tile of outputs that one tile of inputs gives."""
READ = 6
"""Side of a tile of inputs."""
MIN_CHANNELS = 96
"""Fewest input and output channels of a convolution that gets faster. At 64 it does not."""
STRIP = 192
"""Tiles that are transformed together, so that their products stay in the CPU's cache."""
BLOCK = 2048
"""Pixels that `BlockedGDN` takes at a time."""

_INPUT = torch.tensor([
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
]).float()  # fmt: skip
_KERNEL = torch.tensor([
    [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
_OUTPUT = torch.tensor([
    [1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1],
]).float()  # fmt: skip
_REST = range(1, READ)
_ORDER = torch.tensor([
    *(READ * i for i in _REST), *(READ * i + j for i in _REST for j in _REST), *_REST, 0,
])  # fmt: skip
"""Order of the 36 values (i, j), as READ * i + j. Kernels whose first row or column is zero have no
product at i = 0 or j = 0. In this order, those that they have are next to each other."""


class WinogradConv(nn.Module):
    """A 3×3 convolution with padding 1, then a pixel shuffle by `scale`; equal to 1e-5."""

    def __init__(self, conv: nn.Conv2d, scale: int = 1) -> None:
        super().__init__()
        self.scale, self.channels = scale, conv.out_channels // scale**2
        transform = torch.kron(_KERNEL, _KERNEL)[_ORDER].float()  # (36, 9)
        kernels = [conv.weight.detach()[i :: scale**2] for i in range(scale**2)]
        self.parts = [_part(transform, kernel) for kernel in kernels]
        self.bias = _bias(conv).view(self.channels, -1).T.contiguous()  # (scale², O)
        self.input = torch.kron(_INPUT, _INPUT)[_ORDER].contiguous()  # (36, 36)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (1, I, h, w) -> (1, O, scale·h, scale·w), channels last."""
        rows, columns = (-(-side // TILE) * TILE * self.scale for side in x.shape[2:])
        out = x.new_empty(rows, columns, self.channels)
        for top, tiles in self.strips(x):
            self._write(tiles, out[top:])
        height, width = (side * self.scale for side in x.shape[2:])
        return out[:height, :width].permute(2, 0, 1)[None]

    def strips(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield strips of `x`: the first row of their output, and their transformed tiles.

        The tiles are (36, rows, columns, I), with rows and columns counted in tiles.
        """
        _, channels, h, w = x.shape
        rows, columns = -(-h // TILE), -(-w // TILE)
        pixels, step = x[0].permute(1, 2, 0), max(1, STRIP // columns)
        for top in range(0, rows, step):
            count = min(step, rows - top)
            padded = x.new_zeros(TILE * count + 2, TILE * columns + 2, channels)
            first = TILE * top - 1
            read = pixels[max(first, 0) : first + len(padded)]
            start = max(-first, 0)
            padded[start : start + len(read), 1 : w + 1] = read
            row, column, _ = padded.stride()
            tiles = padded.as_strided(
                (READ, READ, count, columns, channels), (row, column, TILE * row, TILE * column, 1)
            )
            values = self.input @ tiles.reshape(READ**2, -1)
            yield TILE * self.scale * top, values.view(READ**2, count, columns, channels)

    def output(self, tiles: Tensor) -> Tensor:
        """Return the output of a strip's `tiles`, (1, O, rows, columns), channels last."""
        rows, columns = (TILE * self.scale * side for side in tiles.shape[1:3])
        out = tiles.new_empty(rows, columns, self.channels)
        self._write(tiles, out)
        return out.permute(2, 0, 1)[None]

    def _write(self, tiles: Tensor, out: Tensor) -> None:
        """Write the output of `tiles` to the first rows of `out` (…, columns, O)."""
        _, rows, columns, _ = tiles.shape
        s, channels = self.scale, self.channels
        to = out[: rows * TILE * s].view(rows, TILE, s, columns, TILE, s, channels)
        for i, (span, kernel, output) in enumerate(self.parts):
            products = torch.bmm(tiles[span].flatten(1, 2), kernel)
            pixels = (output @ products.flatten(1)).view(-1, channels).add_(self.bias[i])
            pixels = pixels.view(TILE, TILE, rows, columns, channels).permute(2, 0, 3, 1, 4)
            to[:, :, i // s, :, :, i % s] = pixels


def _part(transform: Tensor, kernel: Tensor) -> tuple[slice, Tensor, Tensor]:
    """`kernel` (O, I, 3, 3) -> its span in the 36 values, its matrices there, and their outputs.

    The matrices are (span, I, O), the transform of the outputs is (16, span).
    """
    matrices = torch.tensordot(transform, kernel.flatten(2).permute(2, 1, 0), 1)
    used = matrices.flatten(1).any(1).nonzero()
    span = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    output = torch.kron(_OUTPUT, _OUTPUT)[:, _ORDER[span]]
    return span, matrices[span].contiguous(), output.contiguous()


class BlockedGDN(nn.Module):
    """An `InverseGDN` that takes a block of pixels at a time, so that they stay in the cache."""

    def __init__(self, gdn: InverseGDN) -> None:
        super().__init__()
        self.beta, self.gamma = _bias(gdn.norm), gdn.norm.weight[:, :, 0, 0].T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """`x` (1, C, h, w), channels last."""
        _, channels, height, width = x.shape
        pixels = x[0].permute(1, 2, 0).reshape(-1, channels)
        out = torch.empty_like(pixels)
        for i in range(0, len(pixels), BLOCK):
            block, to = pixels[i : i + BLOCK], out[i : i + BLOCK]
            torch.addmm(self.beta, block * block, self.gamma, out=to).sqrt_().mul_(block)
        return out.view(height, width, channels).permute(2, 0, 1)[None]


class WinogradSynthesis(nn.Module):
    """An `InferenceSynthesis` whose last layers take strips of the third one's output.

    The features at half the picture's resolution, which are the most, never exist as a whole.
    """

    def __init__(self, net: InferenceSynthesis) -> None:
        super().__init__()
        self.channels = net.channels
        *head, third = net.head
        activation, last = net.tail
        assert isinstance(third, nn.ConvTranspose2d)
        assert isinstance(last, SubPixel)
        self.third = WinogradConv(SubPixel(third).conv, 2)
        self.head, self.activation = nn.Sequential(*head), nn.Sequential(activation)
        for part in (self.head, self.activation):
            replace_layers(part)
        self.kernels = last.transposed.weight.flatten(1).T.contiguous()  # (75, N): 3 of 5×5
        self.bias = _bias(last.transposed)

    def forward(self, y_hat: Tensor) -> Tensor:
        """`y_hat` (1, M, h, w) -> x_hat (1, 3, 16h, 16w)."""
        used = y_hat[:, self.channels].contiguous(memory_format=torch.channels_last)
        features = self.head(used)
        height, width = (2 * side for side in features.shape[2:])
        taps = features.new_empty(len(self.kernels), height, width)
        for top, tiles in self.third.strips(features):
            strip = self.activation(self.third.output(tiles))[0, :, : height - top, :width]
            taps[:, top : top + strip.shape[1]] = torch.tensordot(self.kernels, strip, 1)
        # each pixel adds 5×5 values to the picture, at a stride of 2
        size = 2 * height + 3, 2 * width + 3
        picture = F.fold(taps.flatten(1)[None], size, kernel_size=5, stride=2)[:, :, 2:-1, 2:-1]
        return picture + self.bias[:, None, None]


def accelerated(net: InferenceSynthesis | ResidualSynthesis) -> nn.Module:
    """Return a network with the result of `net`, whose layers it uses and changes."""
    if isinstance(net, InferenceSynthesis):
        return WinogradSynthesis(net)
    replace_layers(net)
    return net


def is_faster(net: nn.Module) -> bool:
    """Return True if `net` has convolutions that `replace_layers` makes faster."""
    kinds = nn.Conv2d, nn.ConvTranspose2d
    return any(isinstance(layer, kinds) and _is_wide(layer) for layer in net.modules())


def replace_layers(net: nn.Module) -> None:
    """Replace the layers in `net` that get faster."""
    for name, layer in list(net.named_children()):
        fast = _replacement(layer)
        if fast is None:
            replace_layers(layer)
        else:
            setattr(net, name, fast)


def _replacement(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, InverseGDN):
        return BlockedGDN(layer)
    if isinstance(layer, nn.ConvTranspose2d) and _is_wide(layer):
        return WinogradConv(SubPixel(layer).conv, 2)
    if isinstance(layer, nn.Sequential) and len(layer) == 2:
        conv, shuffle = layer
        if isinstance(conv, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle) and _is_wide(conv):
            return WinogradConv(conv, shuffle.upscale_factor)
    if isinstance(layer, nn.Conv2d) and _is_wide(layer):
        return WinogradConv(layer)
    return None


def _is_wide(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    channels = min(layer.in_channels, layer.out_channels)
    return layer.kernel_size != (1, 1) and channels >= MIN_CHANNELS


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach()
