"""Samplers, compared with closed forms for a Gaussian target, whose denoiser is known exactly."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.diffusion import noise, sampler, schedule
from models.diffusion.sampler import DenoiserOutput, Noise
from models.errors import Canceled
from models.tiers import Settings

MEAN, DEVIATION = 0.4, 0.7
SHAPE = (3, 64, 64)


def draws(seed: int) -> Noise:
    return lambda number: noise.normals(seed, number, SHAPE)


def exact(x_t: Tensor, t: float, a: float) -> DenoiserOutput:
    """Denoiser for x0 ~ N(MEAN, DEVIATION²): the posterior mean."""
    variance = a * DEVIATION**2 + 1 - a
    x0 = MEAN + math.sqrt(a) * DEVIATION**2 / variance * (x_t - math.sqrt(a) * MEAN)
    return DenoiserOutput(x0, schedule.eps_from_x0(x_t, x0, a))


def exact_with_variance(x_t: Tensor, t: float, a: float) -> DenoiserOutput:
    """Like `exact`, with the variance at its upper bound."""
    out = exact(x_t, t, a)
    return DenoiserOutput(out.x0, out.eps, torch.ones_like(x_t))


@pytest.mark.parametrize(
    ("settings", "process", "tolerance"),
    [
        (Settings("ddim", 100), schedule.Continuous(), 0.02),
        (Settings("ddim", 100, eta=1), schedule.Continuous(), 0.02),
        (Settings("ddim", 200, eta=0.5), schedule.Discrete(), 0.02),
        (Settings("ddpm", 200), schedule.Continuous(), 0.02),
        (Settings("ddpm", 500), schedule.Discrete(), 0.02),
        (Settings("dpmpp-2m", 30), schedule.Continuous(), 0.02),
        (Settings("dpmpp-2m", 10), schedule.Continuous(), 0.04),
    ],
    ids=lambda v: f"{v.sampler}-{v.steps}-{v.eta}" if isinstance(v, Settings) else None,
)
def test_samples_have_the_mean_and_variance_of_the_target(
    settings: Settings, process: schedule.Schedule, tolerance: float
) -> None:
    x = sampler.sample(exact, draws(3), settings, schedule=process)
    assert float(x.mean()) == pytest.approx(MEAN, abs=tolerance)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=tolerance)


def test_samples_with_learned_variance_have_the_mean_and_variance_of_the_target() -> None:
    x = sampler.sample(exact_with_variance, draws(3), Settings("ddpm", 500))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=0.03)


def test_dpm_solver_has_less_than_half_of_ddims_error_with_as_many_steps() -> None:
    """The exact flow maps x_1 to MEAN + DEVIATION x_1 for this target."""
    goal = MEAN + DEVIATION * draws(3)(0)
    error = {
        name: float((sampler.sample(exact, draws(3), Settings(name, 12)) - goal).abs().mean())
        for name in ("ddim", "dpmpp-2m")
    }
    assert error["dpmpp-2m"] < error["ddim"] / 2


def test_gamma_scales_the_standard_deviation() -> None:
    """x_N is gamma times the noise, and the deterministic flow is affine."""
    x = sampler.sample(exact, draws(3), Settings("ddim", 100, gamma=0.5))
    assert float(x.std()) == pytest.approx(0.5 * DEVIATION, abs=0.02)


def test_the_first_estimate_is_the_mean() -> None:
    first: list[Tensor] = []
    settings = Settings("ddim", 4)
    sampler.sample(exact, draws(0), settings, lambda i, n, x0: first.append(x0))
    assert torch.allclose(first[0], torch.full_like(first[0], MEAN), atol=1e-5)


def ddim64(
    x_t: NDArray[np.float64], e: tuple[NDArray[np.float64], ...], a: float, b: float, eta: float
) -> NDArray[np.float64]:
    """Eq. 12 of the DDIM paper as printed; `e` is eps and fresh noise."""
    eps, fresh = e
    sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    predicted = (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)
    out: NDArray[np.float64] = (
        np.sqrt(b) * predicted + np.sqrt(1 - b - sigma**2) * eps + sigma * fresh
    )
    return out


def ddpm64(
    x_t: NDArray[np.float64], e: tuple[NDArray[np.float64], ...], a: float, b: float, part: float
) -> NDArray[np.float64]:
    """Eq. 11 of the DDPM paper; `part` interpolates from beta tilde to beta in logarithms."""
    eps, fresh = e
    beta = 1 - a / b
    mean = (x_t - beta / np.sqrt(1 - a) * eps) / np.sqrt(1 - beta)
    tilde = (1 - b) / (1 - a) * beta
    out: NDArray[np.float64] = mean + np.sqrt(tilde ** (1 - part) * beta**part) * fresh
    return out


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.3), (0.2, 0.5), (0.9, 0.99)])
def test_steps_equal_the_printed_formulas_in_float64(a: float, b: float) -> None:
    x_t, eps, fresh = torch.randn(3, 1, 3, 8, 8, dtype=torch.float64)
    x0 = schedule.x0_from_eps(x_t, eps, a)
    arrays = x_t.numpy(), (eps.numpy(), fresh.numpy())
    for eta in (0.0, 0.3, 1.0):
        ours = sampler.ddim_step(x0, eps, a, b, eta, fresh)
        assert np.allclose(ours.numpy(), ddim64(*arrays, a, b, eta), atol=1e-12)
    for part in (None, 0.5):
        fraction = None if part is None else torch.full_like(x_t, part)
        ours = sampler.ddpm_step(x_t, x0, a, b, fresh, fraction)
        assert np.allclose(ours.numpy(), ddpm64(*arrays, a, b, part or 0), atol=1e-12)


@pytest.mark.parametrize(("a_t", "a_prev"), [(0.0, 0.3), (0.2, 0.5), (0.9, 0.99)])
def test_ddim_with_eta_1_is_the_ddpm_posterior(a_t: float, a_prev: float) -> None:
    x0, eps, fresh = torch.randn(3, 1, 3, 8, 8, dtype=torch.float64)
    x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
    ddim = sampler.ddim_step(x0, eps, a_t, a_prev, 1.0, fresh)
    ddpm = sampler.ddpm_step(x_t, x0, a_t, a_prev, fresh)
    assert torch.allclose(ddim, ddpm, atol=1e-12)


def test_the_first_step_of_dpm_solver_is_a_ddim_step() -> None:
    """Without a previous estimate, DPM-Solver++ equals DDIM (section 4 of its paper)."""
    x0, eps = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    a_t, a_prev = 0.2, 0.5
    x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
    ddim = sampler.ddim_step(x0, eps, a_t, a_prev)
    solver = sampler.dpmpp_2m_step(x_t, x0, None, a_t, a_prev, 0.0)
    assert torch.allclose(ddim, solver, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m"])
def test_equal_seeds_give_equal_samples_and_others_differ(name: str) -> None:
    settings = Settings(name, 5)  # type: ignore[arg-type]
    a, b, c = (sampler.sample(exact, draws(s), settings) for s in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_on_step_gets_the_step_number_and_may_cancel() -> None:
    calls: list[tuple[int, int]] = []

    def on_step(step: int, steps: int, x0: Tensor) -> None:
        calls.append((step, steps))
        if step == 3:
            raise Canceled("enough")

    with pytest.raises(Canceled):
        sampler.sample(exact, draws(0), Settings("ddim", 10), on_step)
    assert calls == [(1, 10), (2, 10), (3, 10)]


def test_a_single_step_gives_the_posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ddim", "ddpm"):
        x = sampler.sample(exact, draws(0), Settings(name, 1))
        assert torch.allclose(x, torch.full_like(x, MEAN), atol=1e-5)


def test_noise_is_drawn_only_if_the_sampler_needs_it() -> None:
    def indices_of_draws(settings: Settings) -> list[int]:
        indices: list[int] = []

        def record(number: int) -> Tensor:
            indices.append(number)
            return noise.normals(0, number, SHAPE)

        sampler.sample(exact, record, settings)
        return indices

    assert indices_of_draws(Settings("ddim", 4)) == [0]
    assert indices_of_draws(Settings("dpmpp-2m", 4)) == [0]
    assert indices_of_draws(Settings("ddpm", 4)) == [0, 1, 2, 3]
    assert indices_of_draws(Settings("ddim", 4, eta=0.5)) == [0, 1, 2, 3]
