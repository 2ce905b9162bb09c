"""Samplers as pure functions: from noise to a picture in `steps` denoiser calls.

Every draw comes from a counter-based generator (Philox 4x32-10, Salmon 2011) keyed by (seed, step,
position), so that it does not depend on batch, tile or worker.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from models import schedule
from models.tiers import Settings

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t, t) -> v, both (1, C, H, W)."""
OnStep = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, current x0); may raise `Canceled`."""


def ddim_step(
    x_t: Tensor, x0: Tensor, eps: Tensor, a_t: float, a_prev: float, eta: float, noise: Tensor
) -> Tensor:
    """x_t -> x_{t-1}: eqs. 12 and 16 of arXiv:2010.02502; `a` is alpha-bar."""
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))
    return math.sqrt(a_prev) * x0 + direction * eps + sigma * noise


def ddpm_step(x_t: Tensor, x0: Tensor, a_t: float, a_prev: float, noise: Tensor) -> Tensor:
    """x_t -> x_{t-1}: eqs. 6 and 7 of arXiv:2006.11239, the posterior's variance."""
    beta = 1 - a_t / a_prev
    mean_x0 = math.sqrt(a_prev) * beta / (1 - a_t)
    mean_x_t = math.sqrt(1 - beta) * (1 - a_prev) / (1 - a_t)
    return mean_x0 * x0 + mean_x_t * x_t + math.sqrt((1 - a_prev) / (1 - a_t) * beta) * noise


def sample(
    denoise: Denoiser,
    shape: tuple[int, int, int],
    settings: Settings,
    seed: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run `denoise` from noise to x0 (1, C, H, W) for `shape` (C, H, W), C at most 4.

    `on_step` is called after every denoiser call; what it raises ends the sampling.
    """
    times = schedule.times(settings.steps)
    x_t = settings.gamma * normals(seed, 0, shape)
    x0 = x_t
    for step, (t, t_prev) in enumerate(zip(times, times[1:], strict=False), 1):
        a_t, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        v = denoise(x_t, t)
        x0 = schedule.x0_from_v(x_t, v, a_t)
        if on_step is not None:
            on_step(step, settings.steps, x0)
        if t_prev == 0:
            break
        stochastic = settings.sampler == "ddpm" or settings.eta > 0
        noise = normals(seed, step, shape) if stochastic else torch.zeros(())
        if settings.sampler == "ddpm":
            x_t = ddpm_step(x_t, x0, a_t, a_prev, noise)
        else:
            eps = schedule.eps_from_v(x_t, v, a_t)
            x_t = ddim_step(x_t, x0, eps, a_t, a_prev, settings.eta, noise)
    return x0


def normals(
    seed: int, step: int, shape: tuple[int, int, int], origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """Standard normals (1, C, H, W), C at most 4; an entry depends on `origin` + (y, x) only.

    `seed` is any integer in 0…2^64 - 1.
    """
    channels, height, width = shape
    words = _philox(seed & 0xFFFFFFFF, seed >> 32, step, origin[0], origin[1], height, width)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32  # (4, H, W) in (0, 1)
    radius = np.sqrt(-2 * np.log(uniform[::2]))
    angle = 2 * np.pi * uniform[1::2]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(pairs[:channels].astype(np.float32))[None]


@njit(cache=True, nogil=True)
def _philox(low, high, step, top, left, height, width):  # type: ignore[no-untyped-def]  # pragma: no cover
    out = np.empty((4, height, width), np.uint32)
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for i in range(height):
        for j in range(width):
            c0, c1 = np.uint64(top + i), np.uint64(left + j)
            c2, c3 = np.uint64(step), np.uint64(0)
            k0, k1 = np.uint64(low), np.uint64(high)
            for _ in range(10):
                p0 = np.uint64(0xD2511F53) * c0
                p1 = np.uint64(0xCD9E8D57) * c2
                c0, c1, c2, c3 = (
                    (p1 >> shift) ^ c1 ^ k0,
                    p1 & mask,
                    (p0 >> shift) ^ c3 ^ k1,
                    p0 & mask,
                )
                k0 = (k0 + np.uint64(0x9E3779B9)) & mask
                k1 = (k1 + np.uint64(0xBB67AE85)) & mask
            out[0, i, j], out[1, i, j], out[2, i, j], out[3, i, j] = c0, c1, c2, c3
    return out
