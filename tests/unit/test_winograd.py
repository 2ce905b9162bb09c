"""Convolutions with fewer multiplications give the results of ordinary ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models.codec import winograd
from models.codec.architectures import ARCHITECTURES
from models.codec.inference_synthesis import InverseGDN, for_inference
from models.codec.networks import Network
from models.codec.winograd import BlockedGDN, WinogradConv


def features(channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (8, 13), (30, 3), (3, 300)])
@torch.no_grad()
def test_a_convolution_of_any_size_is_equal(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(10, 12, 3, padding=1)
    x = features(10, *size)
    torch.testing.assert_close(WinogradConv(conv)(x), conv(x), rtol=1e-5, atol=1e-5)
    shuffled = nn.functional.pixel_shuffle(conv(x), 2)
    torch.testing.assert_close(WinogradConv(conv, 2)(x), shuffled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_convolution_in_strips_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "STRIP", 6)
    conv, x = nn.Conv2d(10, 12, 3, padding=1), features(10, 30, 11)
    torch.testing.assert_close(WinogradConv(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_products_with_zeros_are_left_out() -> None:
    """As in a transposed 5×5 convolution, of whose four 3×3 kernels three have zeros."""
    conv, x = nn.Conv2d(10, 4, 3, padding=1), features(10, 9, 9)
    conv.weight[1::2, :, :, 0] = 0
    conv.weight[2:, :, 0] = 0
    fast = WinogradConv(conv, 2)
    assert [len(matrices) for _, matrices, _ in fast.parts] == [36, 30, 30, 25]
    expected = nn.functional.pixel_shuffle(conv(x), 2)
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    conv.weight[:] = 0
    torch.testing.assert_close(WinogradConv(conv)(x), conv(x))


@torch.no_grad()
def test_the_inverse_gdn_by_blocks_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "BLOCK", 50)
    gdn = InverseGDN(torch.rand(6) + 0.1, torch.rand(6, 6, 1, 1))
    for x in (features(6, 11, 13), features(6, 11, 13)[:, :, 2:, :9]):
        torch.testing.assert_close(BlockedGDN(gdn)(x), gdn(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_synthesis_of_every_architecture_is_equal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 4)
    torch.manual_seed(0)
    M = 8 if name.startswith("cheng") else 12
    g_s = Network(ARCHITECTURES[name], 8, M).eval().requires_grad_(False).g_s
    y_hat = 5 * features(M, 9, 6)
    net = for_inference(copy.deepcopy(g_s))
    assert winograd.is_faster(net)
    fast = winograd.accelerated(net)
    assert any(isinstance(layer, WinogradConv) for layer in fast.modules())
    expected = g_s(y_hat)
    assert expected.std() > 0.01
    torch.testing.assert_close(fast(y_hat), expected, rtol=1e-4, atol=5e-5)
