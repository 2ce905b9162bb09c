"""Narrow a compact diffusion decoder to fewer channels and blocks, as a start for training.

On each level, all blocks read and write one residual stream, to which the conditioner's map is
added. So the same channels of a level are kept in all of its layers: those that its blocks use
most, measured on real crops. A block's hidden channels are chosen in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from models.diffusion.blocks import Block, RMSNorm
from models.diffusion.presets import UNetConfig
from models.diffusion.unet import UNet
from models.errors import WeightsError

Axes = tuple[Tensor | None, Tensor | None]
"""Numbers of the output and input channels of a layer that are kept; None: all of them."""


@torch.no_grad()
def narrow(wide: UNet, config: UNetConfig, run: Callable[[], object]) -> UNet:
    """Return a network of `config` with the most used channels and the first blocks of `wide`.

    `run` calls `wide` on crops, on which the use of its channels is measured; it may move `wide` to
    a device. Both networks are on the CPU afterwards. Raises `WeightsError` if `config` is not a
    smaller form of the configuration of `wide`.
    """
    for c in (wide.config, config):
        if c.preset != "compact" or c.condition != c.widths:
            raise WeightsError(
                f"a network of the widths {c.widths} whose conditioner has {c.condition}: "
                "narrow from and to networks of the presets compact and small"
            )
    with _measured(wide) as powers:
        run()
    wide.cpu()
    norms = {module: name for name, module in wide.named_modules()}
    kept = _Kept(wide, config.widths, powers)
    net, old = UNet(config), wide.state_dict()
    state = net.state_dict()
    for name, value in state.items():
        try:
            value.copy_(_select(old[name], kept.axes(name)))
        except (KeyError, RuntimeError) as e:
            raise WeightsError(
                f"a network of {wide.config} cannot be narrowed to {config}: {name} does not fit"
            ) from e
    for module, power in powers.items():  # a norm divides by the power of the kept channels now
        name = f"{norms[module]}.gain"
        if name in state:
            kept_power = power[kept.axes(name)[0]]
            state[name].mul_((kept_power.mean() / power.mean()).sqrt())
    return net


class _Kept:
    """The channels of a wide network that are kept."""

    def __init__(self, wide: UNet, widths: Sequence[int], powers: dict[nn.Module, Tensor]) -> None:
        blocks = {name: m for name, m in wide.named_modules() if isinstance(m, Block)}
        self.wide_widths = wide.config.widths
        self.streams = [
            _largest(
                sum(
                    (_use(b.norm1, b.conv1, powers) for n, b in blocks.items() if _level(n) == i),
                    start=torch.zeros(wide.config.widths[i]),
                ),
                width,
            )
            for i, width in enumerate(widths[: len(self.wide_widths)])
        ]
        self.hidden = {
            name: _largest(_use(b.norm2, b.conv2, powers), len(self.streams[_level(name)]))
            for name, b in blocks.items()
        }

    def axes(self, name: str) -> Axes:
        """The kept channels of the layer to which the tensor `name` belongs."""
        match name.split("."):
            case ["conditioner", "latents", *_]:
                return self.streams[-1], None
            case ["conditioner", "picture", _] | ["denoiser", "inward" | "norm", _]:
                return self.streams[0], None
            case ["denoiser", "outward", _] | ["denoiser", "smooth", "fold", _]:
                return None, self.streams[0]
            case ["conditioner", "down" | "up" as way, finer, "conv", _]:
                return self._shuffle(int(finer), way == "down")
            case ["denoiser", "enter" | "leave" as way, coarser, "conv", _]:
                return self._shuffle(int(coarser) - 1, way == "enter")
            case [net, "blocks" | "down" | "up" as way, level, number, layer, _]:
                return self._block(f"{net}.{way}.{level}.{number}", layer)
        return None, None

    def _shuffle(self, finer: int, down: bool) -> Axes:
        """Axes of a convolution next to a pixel shuffle, which has four channels for one."""
        fine, coarse = self.streams[finer], self.streams[finer + 1]
        fine = (4 * fine[:, None] + torch.arange(4)).flatten()
        return (coarse, fine) if down else (fine, coarse)

    def _block(self, block: str, layer: str) -> Axes:
        stream, hidden = self.streams[_level(block)], self.hidden[block]
        scale_and_shift = torch.cat([stream, stream + self.wide_widths[_level(block)]])
        axes: dict[str, Axes] = {
            "norm1": (stream, None),
            "conv1": (hidden, stream),
            "norm2": (hidden, None),
            "conv2": (stream, hidden),
            "modulation": (scale_and_shift, None),
        }
        return axes[layer]


def _level(block: str) -> int:
    """Level of a block, from its name: `denoiser.up.0.1` is the second block of level 0."""
    return int(block.split(".")[2])


def _select(tensor: Tensor, axes: Axes) -> Tensor:
    rows, columns = axes
    if rows is not None:
        tensor = tensor[rows]
    return tensor if columns is None or tensor.ndim < 2 else tensor[:, columns]


def _use(norm: nn.Module, reader: nn.Conv2d, powers: dict[nn.Module, Tensor]) -> Tensor:
    """How much `reader` uses each channel (C,) of the input of `norm`."""
    assert isinstance(norm, RMSNorm)
    share = (powers[norm] / powers[norm].mean()).sqrt()
    return share * norm.gain.abs() * reader.weight.square().sum((0, 2, 3)).sqrt()


def _largest(values: Tensor, n: int) -> Tensor:
    """Indices of the `n` largest values, in ascending order; all of them if there are fewer."""
    return values.topk(min(n, len(values))).indices.sort().values


@contextmanager
def _measured(net: UNet) -> Iterator[dict[nn.Module, Tensor]]:
    """Yield the mean square of each channel (C,) at the input of each norm of the last call."""
    powers: dict[nn.Module, Tensor] = {}

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        powers[norm] = inputs[0].square().mean((0, 2, 3)).cpu()

    with ExitStack() as hooks:
        for module in net.modules():
            if isinstance(module, RMSNorm):
                hooks.callback(module.register_forward_pre_hook(measure).remove)
        yield powers
