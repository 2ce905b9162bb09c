"""Samplers against closed forms, on a Gaussian target whose exact denoiser is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models import sampler, schedule
from models.errors import Canceled, ParameterError
from models.tiers import TIERS, Settings, check_seed, find

MEAN, DEVIATION = 0.4, 0.7
SHAPE = (3, 64, 64)


def exact_v(x_t: Tensor, t: float) -> Tensor:
    """The v of the posterior mean of x0 ~ N(MEAN, DEVIATION²)."""
    a = schedule.alpha_bar(t)
    variance = a * DEVIATION**2 + 1 - a
    x0 = MEAN + math.sqrt(a) * DEVIATION**2 / variance * (x_t - math.sqrt(a) * MEAN)
    if a == 1:
        return torch.zeros_like(x_t)
    return (math.sqrt(a) * x_t - x0) / math.sqrt(1 - a)


@pytest.mark.parametrize(
    "settings",
    [Settings("ddim", 100), Settings("ddim", 100, eta=1), Settings("ddpm", 200)],
    ids=["ddim", "ddim eta 1", "ddpm"],
)
def test_samples_have_the_mean_and_variance_of_the_target(settings: Settings) -> None:
    x = sampler.sample(exact_v, SHAPE, settings, seed=3)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=0.02)


def test_the_first_estimate_is_the_mean() -> None:
    first: list[Tensor] = []
    sampler.sample(exact_v, SHAPE, Settings("ddim", 4), 0, lambda i, n, x0: first.append(x0))
    assert torch.allclose(first[0], torch.full_like(first[0], MEAN), atol=1e-5)


@pytest.mark.parametrize(("a_t", "a_prev"), [(0.0, 0.3), (0.2, 0.5), (0.9, 0.99)])
def test_ddim_with_eta_1_is_the_ddpm_posterior(a_t: float, a_prev: float) -> None:
    x0, eps, noise = torch.randn(3, 1, 3, 8, 8, dtype=torch.float64)
    x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
    ddim = sampler.ddim_step(x_t, x0, eps, a_t, a_prev, 1.0, noise)
    ddpm = sampler.ddpm_step(x_t, x0, a_t, a_prev, noise)
    assert torch.allclose(ddim, ddpm, atol=1e-12)


def test_one_seed_is_one_picture_and_two_seeds_are_two() -> None:
    a, b, c = (sampler.sample(exact_v, SHAPE, Settings("ddpm", 5), s) for s in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_noise_depends_on_position_not_on_the_tile() -> None:
    whole = sampler.normals(5, 2, (3, 40, 50))
    tile = sampler.normals(5, 2, (3, 16, 20), origin=(11, 23))
    assert torch.equal(tile, whole[:, :, 11:27, 23:43])


def test_noise_is_normal_and_differs_by_step_and_channel() -> None:
    a, b = (sampler.normals(2**63 + 1, step, (3, 128, 128)) for step in (0, 1))
    assert float(a.mean()) == pytest.approx(0, abs=0.02)
    assert float(a.var()) == pytest.approx(1, abs=0.02)
    channels = torch.cat([a[0].flatten(1), b[0].flatten(1)])
    correlation = np.corrcoef(channels.numpy()) - np.eye(6)
    assert np.abs(correlation).max() < 0.03


def test_philox_gives_the_published_words() -> None:
    """The known answer of Random123's philox4x32-10 for all zeros."""
    zero = sampler._philox(0, 0, 0, 0, 0, 1, 1)[:, 0, 0]
    assert [hex(int(w)) for w in zero] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_on_step_counts_and_may_cancel() -> None:
    seen: list[tuple[int, int]] = []

    def on_step(step: int, steps: int, x0: Tensor) -> None:
        seen.append((step, steps))
        if step == 3:
            raise Canceled("enough")

    with pytest.raises(Canceled):
        sampler.sample(exact_v, SHAPE, Settings("ddim", 10), 0, on_step)
    assert seen == [(1, 10), (2, 10), (3, 10)]


def test_respacing_begins_with_pure_noise_and_ends_with_the_picture() -> None:
    assert schedule.times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule.alpha_bar(1.0) == 0
    assert len(schedule.times(1000)) == 1001
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            schedule.times(wrong)


def test_v_holds_both_picture_and_noise() -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    a = 0.3
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
    assert torch.allclose(schedule.x0_from_v(x_t, v, a), x0)
    assert torch.allclose(schedule.eps_from_v(x_t, v, a), eps)


def test_tiers_are_those_of_the_paper_and_our_own() -> None:
    assert {t.name: t.settings.steps for t in TIERS.values() if t.settings} == {
        "perceptual": 4, "ddim-10": 10, "ddim-100": 100, "ddpm-100": 100, "ddpm-1000": 1000
    }  # fmt: skip
    assert find("perceptual").settings is not None
    with pytest.raises(ParameterError, match="perceptual"):
        find("best")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1001},
        {"eta": 1.1},
        {"beta": -0.1},
        {"gamma": math.nan},
        {"sampler": "ddpm", "eta": 0.5},
    ],
)
def test_settings_outside_their_ranges_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        Settings(**{"sampler": "ddim", "steps": 10, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(ParameterError):
        check_seed(seed)
