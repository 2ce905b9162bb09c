"""Diffusion samplers: DDIM, DDPM and DPM-Solver++. Each step is a pure function."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.schedule import Continuous, Schedule
from models.tiers import Settings

DPM_START = 0.995
"""Start time of DPM-Solver++, because the log-SNR is minus infinity at t = 1."""


@dataclass(frozen=True, slots=True)
class DenoiserOutput:
    """Estimates from one denoiser call on x_t, each (B, C, H, W).

    `fraction` in [0, 1] is the position of the log variance between its bounds (Nichol & Dhariwal
    2021, eq. 15); None unless the network predicts the variance.
    """

    x0: Tensor
    eps: Tensor
    fraction: Tensor | None = None


Denoise = Callable[[Tensor, float, float], DenoiserOutput]
"""(x_t, t, alpha-bar) -> estimates of x0 and eps."""
Noise = Callable[[int], Tensor]
"""Number of the draw -> standard normals (B, C, H, W); number 0 is the initial noise."""
OnStep = Callable[[int, int, Tensor], None]
"""Called with (steps done, total steps, current x0). An exception from it ends the sampling."""


def ddim_step(
    x0: Tensor,
    eps: Tensor,
    a_t: float,
    a_prev: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One DDIM step x_t -> x_{t-1}: eqs. 12 and 16 of arXiv:2010.02502; `a` is alpha-bar.

    `noise` is required if `eta` is above 0.
    """
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))
    mean = torch.add(math.sqrt(a_prev) * x0, eps, alpha=direction)
    return mean if noise is None else mean + sigma * noise


def ddpm_step(
    x_t: Tensor,
    x0: Tensor,
    a_t: float,
    a_prev: float,
    noise: Tensor,
    fraction: Tensor | None = None,
) -> Tensor:
    """One DDPM step x_t -> x_{t-1}: eqs. 6 and 7 of arXiv:2006.11239.

    The variance is that of the posterior. With `fraction`, its logarithm is interpolated between
    those of the posterior's variance and beta (arXiv:2102.09672, eq. 15).
    """
    beta = 1 - a_t / a_prev
    mean_x0 = math.sqrt(a_prev) * beta / (1 - a_t)
    mean_x_t = math.sqrt(1 - beta) * (1 - a_prev) / (1 - a_t)
    posterior = (1 - a_prev) / (1 - a_t) * beta
    mean = mean_x0 * x0 + mean_x_t * x_t
    if fraction is None:
        return mean + math.sqrt(posterior) * noise
    low, high = math.log(posterior), math.log(beta)
    return mean + torch.exp((low + fraction * (high - low)) / 2) * noise


def dpmpp_2m_step(
    x_t: Tensor,
    x0: Tensor,
    x0_before: Tensor | None,
    a_t: float,
    a_prev: float,
    a_before: float,
) -> Tensor:
    """One DPM-Solver++ (2M) step x_t -> x_{t-1}: algorithm 2 of arXiv:2211.01095.

    `x0_before` is the estimate of the previous step, at `a_before`; None in the first step.
    """
    h = _half_log_snr(a_prev) - _half_log_snr(a_t)
    d = x0
    if x0_before is not None:
        r = (_half_log_snr(a_t) - _half_log_snr(a_before)) / h
        d = x0 + (x0 - x0_before) / (2 * r)
    ratio = math.sqrt((1 - a_prev) / (1 - a_t))
    return ratio * x_t - math.sqrt(a_prev) * math.expm1(-h) * d


def sample(
    denoise: Denoise,
    noise: Noise,
    settings: Settings,
    on_step: OnStep | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Sample x0 in `settings.steps` calls of `denoise`, from the initial noise `noise(0)`.

    `on_step` is called after every step; an exception that it raises ends the sampling.
    """
    start = DPM_START if settings.sampler == "dpmpp-2m" else 1.0
    steps = (schedule or Continuous()).steps(settings.steps, start)
    x_t = settings.gamma * noise(0)
    x0_before, a_before = None, 0.0
    for number, step in enumerate(steps, 1):
        out = denoise(x_t, step.t, step.a)
        if on_step is not None:
            on_step(number, settings.steps, out.x0)
        if step.a_prev == 1:
            return out.x0
        if settings.sampler == "dpmpp-2m":
            x_t = dpmpp_2m_step(x_t, out.x0, x0_before, step.a, step.a_prev, a_before)
            x0_before, a_before = out.x0, step.a
        elif settings.sampler == "ddpm":
            x_t = ddpm_step(x_t, out.x0, step.a, step.a_prev, noise(number), out.fraction)
        else:
            fresh = noise(number) if settings.eta > 0 else None
            x_t = ddim_step(out.x0, out.eps, step.a, step.a_prev, settings.eta, fresh)
    raise AssertionError("the last step of a schedule must have a_prev == 1")


def _half_log_snr(a: float) -> float:
    return 0.5 * math.log(a / (1 - a))
