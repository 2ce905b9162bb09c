"""The networks: size, cost, receptive field, gradients."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from models.diffusion import presets
from models.diffusion.conditioner import Condition, Maps, PerQuality
from models.diffusion.presets import COMPACT, FINE, PAPER, PRESETS, SMALL, UNetConfig
from models.diffusion.unet import UNet

TINY_PAPER = replace(
    PAPER, widths=(32, 32, 64, 64, 64), condition=(32, 32, 32, 64), embedding=64, latents=16
)


def condition(c: UNetConfig, size: int, batch: int = 1) -> Condition:
    small = size // 16
    return Condition(
        torch.rand(batch, 3, size, size), 4 * torch.randn(batch, c.latents, small, small),
        20 * torch.rand(batch, 1, small, small), torch.ones(batch, dtype=torch.int64),
        torch.zeros(batch), torch.ones(batch),
    )  # fmt: skip


def random_maps(c: UNetConfig, size: int) -> Maps:
    widths = zip(c.condition, c.map_strides, strict=True)
    return tuple(torch.randn(1, w, size // s, size // s) for w, s in widths)


def kilo_macs(net: UNet, size: int) -> tuple[float, float]:
    """Thousands of MACs per pixel: of the conditioner, and of a denoiser step."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a second: it imports triton

    inputs = condition(net.config, size)
    x_t, t = torch.zeros(1, 3, size, size), torch.zeros(1)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as once:
            maps = net.conditioner(inputs)
        with FlopCounterMode(display=False) as step:
            net.denoiser(x_t, t, maps, inputs.quality, t)
    first, second = (c.get_total_flops() / 2e3 / size**2 for c in (once, step))
    return first, second


def test_the_papers_network_has_113_million_parameters_and_the_published_cost() -> None:
    net = UNet(PAPER)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 113.2
    assert sum(kilo_macs(net, 128)) == pytest.approx(8388, abs=1)


@pytest.mark.parametrize(
    ("c", "once", "step"), [(COMPACT, 40, 54), (SMALL, 12, 24), (FINE, 50, 70)]
)
def test_the_compact_networks_stay_within_their_budget(
    c: UNetConfig, once: float, step: float
) -> None:
    """In kMAC per pixel: once per picture, and per step."""
    cost = kilo_macs(UNet(c), 64)
    assert cost[0] < once
    assert cost[1] < step


@pytest.mark.parametrize(
    "c", [COMPACT, SMALL, FINE, TINY_PAPER], ids=["compact", "small", "fine", "paper"]
)
def test_every_parameter_gets_a_gradient(c: UNetConfig) -> None:
    """Random weights, because zero-initialised layers block the gradient of earlier layers."""
    torch.manual_seed(0)
    net = UNet(c)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    n = c.qualities + 1
    batch = replace(condition(c, 64, n), beta=torch.ones(n), quality=torch.arange(n))
    t = torch.linspace(0.2, 0.7, n)
    out = net.denoiser(torch.randn(n, 3, 64, 64), t, net.conditioner(batch), batch.quality, t)
    assert out.shape == (n, 6 if c.learned_variance else 3, 64, 64)
    out.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_latents_of_each_quality_pass_their_own_convolution() -> None:
    torch.manual_seed(0)
    layer, x = PerQuality(3, 6, 5), torch.randn(3, 6, 4, 7)
    qualities = (3, 1, 3)
    together = layer(x, torch.tensor(qualities))
    for i, quality in enumerate(qualities):
        torch.testing.assert_close(together[i], layer[quality](x[i]))


@pytest.mark.parametrize("c", [COMPACT, SMALL, FINE], ids=["compact", "small", "fine"])
def test_the_receptive_field_is_the_halo(c: UNetConfig) -> None:
    torch.manual_seed(0)
    net = UNet(replace(c, latents=8)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    size, one = 320, torch.ones(1)
    maps = random_maps(c, size)
    x = torch.randn(1, 3, size, size)
    changed = x.clone()
    changed[:, :, :, 160:] += 1

    def run(x_t: Tensor) -> Tensor:
        with torch.inference_mode():
            v: Tensor = net.denoiser(x_t, one * 0.5, maps, torch.tensor([2]), one)
        return v

    reached = (run(x) - run(changed)).abs().amax((0, 1, 2)).nonzero().min()
    # the reach is a multiple of 16 pixels, the coarsest stride
    assert c.halo <= 98
    assert abs(160 - int(reached) - c.halo) <= 16


def test_latents_can_be_hidden() -> None:
    torch.manual_seed(0)
    net = UNet(COMPACT).eval()
    a = replace(condition(COMPACT, 64), latents_visible=torch.zeros(1))
    b = replace(a, y_hat=-a.y_hat)
    with torch.inference_mode():
        assert all(
            torch.equal(m, n) for m, n in zip(net.conditioner(a), net.conditioner(b), strict=True)
        )
        visible = replace(a, latents_visible=torch.ones(1))
        assert not torch.equal(net.conditioner(visible)[-1], net.conditioner(a)[-1])


def test_a_configuration_is_read_back_from_its_json() -> None:
    for c in PRESETS.values():
        assert presets.from_json(json.dumps(asdict(c))) == c
    with pytest.raises(TypeError):
        presets.from_json('{"widths": [1]}')
    with pytest.raises(TypeError, match="not a JSON object"):
        presets.from_json("[1]")
