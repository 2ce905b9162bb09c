"""Narrowing a diffusion decoder to a smaller network."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.diffusion.blocks import Block
from models.diffusion.conditioner import Condition
from models.diffusion.presets import COMPACT, FINE, PAPER, UNetConfig
from models.diffusion.unet import UNet
from models.errors import WeightsError
from models.train.narrow import narrow

WIDE = replace(
    COMPACT, widths=(12, 16, 20), condition=(12, 16, 20), embedding=8, latents=6, qualities=2,
    smooth=4,
)  # fmt: skip
NARROW = replace(WIDE, widths=(5, 7, 9), condition=(5, 7, 9), depth=1, down=(1, 1, 1), up=(1, 1, 0))
DROPPED = [f"conditioner.blocks.{level}.1" for level in range(3)] + ["denoiser.up.0.1"]
"""The blocks of `WIDE` that `NARROW` lacks."""


@pytest.fixture
def wide() -> UNet:
    """A network with random weights everywhere, also where training starts at zero."""
    generator = torch.Generator().manual_seed(0)
    net = UNet(WIDE)
    for value in net.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) / 4)
    return net


def draw(net: UNet) -> Tensor:
    """The network's output for fixed inputs, (2, 3, 64, 64)."""
    g = torch.Generator().manual_seed(1)
    condition = Condition(
        torch.rand(2, 3, 64, 64, generator=g), torch.randn(2, 6, 4, 4, generator=g),
        torch.rand(2, 1, 4, 4, generator=g), torch.tensor([1, 2]), torch.ones(2), torch.ones(2),
    )  # fmt: skip
    x_t = torch.randn(2, 3, 64, 64, generator=g)
    with torch.inference_mode():
        maps = net.conditioner(condition)
        out: Tensor = net.denoiser(x_t, torch.ones(2), maps, condition.quality, condition.beta)
    return out


def silence(net: UNet) -> None:
    """Set to zero all channels beyond the narrow widths, in a random order, and dropped blocks."""
    order = torch.Generator().manual_seed(2)
    unused = [
        torch.randperm(wide, generator=order)[kept:]
        for wide, kept in zip(WIDE.widths, NARROW.widths, strict=True)
    ]
    shuffled = [(4 * u[:, None] + torch.arange(4)).flatten() for u in unused]
    writers = {"conditioner.picture": unused[0], "denoiser.inward": unused[0]}
    writers |= {f"conditioner.latents.{quality}": unused[2] for quality in range(3)}
    for i in range(2):
        for down in (f"conditioner.down.{i}.conv", f"denoiser.enter.{i + 1}.conv"):
            writers[down] = unused[i + 1]
        for up in (f"conditioner.up.{i}.conv", f"denoiser.leave.{i + 1}.conv"):
            writers[up] = shuffled[i]
    for name, block in net.named_modules():
        if isinstance(block, Block):
            level = int(name.split(".")[2])
            width, kept = WIDE.widths[level], NARROW.widths[level]
            writers[f"{name}.modulation"] = torch.cat([unused[level], unused[level] + width])
            writers[f"{name}.conv1"] = torch.randperm(width, generator=order)[kept:]
            writers[f"{name}.conv2"] = torch.arange(width) if name in DROPPED else unused[level]
    for name, rows in writers.items():
        for parameter in net.get_submodule(name).parameters():
            parameter.data[rows] = 0


def test_a_network_whose_other_channels_are_unused_draws_the_same_when_it_is_narrow(
    wide: UNet,
) -> None:
    silence(wide)
    small = narrow(wide, NARROW, lambda: draw(wide))
    assert small.config == NARROW
    torch.testing.assert_close(draw(small), draw(wide), rtol=1e-3, atol=1e-3)
    assert torch.equal(small.scales, wide.scales)


@pytest.mark.parametrize(
    "config",
    [
        replace(NARROW, widths=(5, 7, 24), condition=(5, 7, 24)),
        replace(NARROW, widths=(5, 7, 9, 11), condition=(5, 7, 9, 11), down=(1,) * 4, up=(1,) * 4),
        replace(NARROW, depth=3),
        replace(NARROW, latents=8),
    ],
)
def test_a_network_is_not_narrowed_to_a_larger_one(wide: UNet, config: UNetConfig) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        narrow(wide, config, lambda: draw(wide))


@pytest.mark.parametrize("config", [FINE, PAPER])
def test_other_presets_are_not_narrowed(wide: UNet, config: UNetConfig) -> None:
    with pytest.raises(WeightsError, match="presets compact and small"):
        narrow(wide, config, lambda: draw(wide))
