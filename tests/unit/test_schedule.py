"""Forward processes: respaced steps and coefficients."""

import math

import numpy as np
import pytest
import torch

from models.diffusion import schedule
from models.diffusion.schedule import Continuous, Discrete


def test_the_continuous_process_starts_at_pure_noise_and_ends_at_the_picture() -> None:
    steps = Continuous().steps(4)
    assert [s.t for s in steps] == [1.0, 0.75, 0.5, 0.25]
    assert steps[0].a == 0
    assert steps[-1].a_prev == 1
    assert all(s.a_prev == after.a for s, after in zip(steps, steps[1:], strict=False))
    assert Continuous().steps(3, 0.9)[0].t == 0.9


def test_the_papers_ten_steps_are_its_published_indices() -> None:
    steps = Discrete().steps(10)
    indexes = [round(s.t * 3999) for s in steps]
    assert indexes == [3999, 3555, 3110, 2666, 2222, 1777, 1333, 889, 444, 0]
    assert steps[-1].a_prev == 1
    assert len(Discrete().steps(1000)) == 1000


def test_the_papers_last_step_is_almost_pure_noise() -> None:
    """In the first step, an error in eps is multiplied by 81,165 in x0."""
    a = float(Discrete().alphas_cumprod[-1])
    assert math.sqrt((1 - a) / a) == pytest.approx(81165, rel=0.01)


def test_alphas_cumprod_is_the_product_of_1_minus_beta() -> None:
    process = Discrete(100)
    assert np.allclose(np.cumprod(1 - process.betas), process.alphas_cumprod)
    assert process.betas.max() <= 0.999
    assert process.alphas_cumprod.dtype == np.float64


@pytest.mark.parametrize("process", [Continuous(), Discrete()])
@pytest.mark.parametrize("wrong", [0, 1001])
def test_steps_outside_1_to_1000_are_refused(process: schedule.Schedule, wrong: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        process.steps(wrong)


def test_x0_and_eps_are_recovered_from_v_and_from_each_other() -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    a = 0.3
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
    assert torch.allclose(schedule.x0_from_v(x_t, v, a), x0)
    assert torch.allclose(schedule.eps_from_v(x_t, v, a), eps)
    assert torch.allclose(schedule.x0_from_eps(x_t, eps, a), x0)
    assert torch.allclose(schedule.eps_from_x0(x_t, x0, a), eps)
