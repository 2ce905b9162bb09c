"""Realism: the high-pass filter and the mix of two pictures."""

import pytest
import torch

from models.diffusion import realism
from models.errors import ParameterError


def test_the_high_pass_removes_the_mean_and_keeps_detail() -> None:
    flat = torch.full((1, 3, 64, 64), 0.7)
    assert torch.allclose(realism.high_pass(flat), torch.zeros_like(flat), atol=1e-5)
    texture = torch.sin(torch.arange(64.0) * torch.pi / 2).expand(1, 3, 64, 64)
    assert torch.allclose(realism.high_pass(texture), texture, atol=1e-5)


def test_realism_interpolates_linearly_between_the_two_pictures() -> None:
    x_hat, x = torch.rand(2, 1, 3, 50, 70)
    zero, half, one = (realism.mix(x_hat, x, alpha) for alpha in (0.0, 0.5, 1.0))
    assert torch.equal(zero, x_hat)
    assert torch.equal(one, x)
    assert torch.allclose(half, (x_hat + x) / 2, atol=1e-6)


def test_an_alpha_above_1_and_unequal_shapes_are_refused() -> None:
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ParameterError, match="realism"):
        realism.mix(x, x, 1.1)
    with pytest.raises(ValueError, match="cannot mix"):
        realism.mix(x, torch.zeros(1, 3, 16, 32), 0.5)
