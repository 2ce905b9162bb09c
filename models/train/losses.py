"""Losses of the diffusion decoder as functions of a denoiser; the caller knows the condition."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffusion import schedule
from models.diffusion.sampler import ddim_step

BITS = 1 / math.log(2)
"""Bits in a nat."""
DCT = 8
"""Pixels along a block of which `spectrum` takes the cosine transform; blocks overlap by half."""
REGION = 8
"""Blocks along the square over which it averages their power: 36 pixels."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t (B,)) -> what the network predicts."""


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """`n` times in [0, 1), one from each n-th, in random order, on the generator's device."""
    device = generator.device
    t = torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)
    t = (t / n).clamp(max=1 - 2**-24)  # float32 rounds a sum near n up to it
    return t[torch.randperm(n, generator=generator, device=device)]


def middle(u: Tensor) -> Tensor:
    """Uniform `u` in [0, 1) -> times there, three quarters of them in [.1, .7].

    Above, little but the mean can be known; below, little is left to decide.
    """
    return torch.maximum(torch.minimum(u, 0.02 + 0.8 * u), 2 * u - 1)


def denoising(denoise: Denoise, x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """v-loss weighted by clamp(SNR, 1, 5) / (SNR + 1), and the same for predicting zero.

    Plain min-SNR-5 is zero at t = 1, the step that every sampler starts from.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    target = alpha * eps - sigma * x0
    v = denoise(alpha * x0 + sigma * eps, t)
    snr = (alpha / sigma.clamp(min=1e-4)) ** 2
    weight = snr.clamp(1, 5) / (snr + 1)
    zero = (weight * target.square()).mean()
    return (weight * (v - target).square()).mean(), zero.detach()


def few_steps(calls: int) -> tuple[float, ...]:
    """Times at which a DDIM sampler with `calls` steps calls the denoiser: 1, 1 - 1 / calls, …"""
    return tuple(step.t for step in schedule.Continuous().steps(calls))


def rollout(denoise: Denoise, x_t: Tensor, times: Sequence[float], calls: int) -> Tensor:
    """x_t (B, C, H, W) after the first `calls` DDIM steps along `times`; x0 after all of them."""
    ends = (*times[1:], 0.0)
    for t, t_prev in list(zip(times, ends, strict=True))[:calls]:
        a_t, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        v = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x0, eps = schedule.x0_from_v(x_t, v, a_t), schedule.eps_from_v(x_t, v, a_t)
        x_t = ddim_step(x_t, x0, eps, a_t, a_prev)
    return x_t


def spectrum(picture: Tensor, x: Tensor) -> Tensor:
    """How far local power spectra of the lumas (BT.601) lie apart: mean |ln| of their amplitudes.

    Of (B, 3, H, W) in [0, 1], H and W at least 36. Statistics of a region, not its pixels: detail
    may stand elsewhere, but neither be missing nor have another texture. LPIPS on AlexNet, whose
    first layer looks every fourth pixel, rewards a hatching that this sees. Compared with
    distances of local feature statistics (Ding 2020, DISTS; Qiu 2024, Wasserstein distortion) it
    has fixed features: cosines of 8×8 blocks, without the mean.
    """
    both = torch.cat([picture, x])
    power = F.conv2d(both, _luma_cosines(x.device), stride=DCT // 2).square()
    power = F.avg_pool2d(power, REGION, REGION // 2)
    made, real = (power + 255.0**-2).log().chunk(2)  # below one grey level nothing is seen
    return (made - real).abs().mean() / 2


@functools.cache
def _luma_cosines(device: torch.device) -> Tensor:
    """Orthonormal DCT-II of the luma's 8×8 blocks but its mean, as kernels (63, 3, 8, 8)."""
    k = torch.arange(DCT, dtype=torch.float64)
    rows = torch.cos(math.pi / DCT * (k + 0.5) * k[:, None]) * math.sqrt(2 / DCT)
    rows[0] /= math.sqrt(2)
    cosines = torch.einsum("ij,kl->ikjl", rows, rows).reshape(-1, 1, DCT, DCT)[1:]
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    return (luma * cosines).float().to(device)


@dataclass(frozen=True, slots=True)
class PaperTerms:
    """Terms of Nichol & Dhariwal's hybrid loss, and the picture that the prediction implies."""

    simple: Tensor  # mean squared error of eps: 1 for predicting zero
    vlb: Tensor  # bits per dimension of all T steps; its gradient reaches the variance only
    x0: Tensor  # (B, 3, H, W) in [-1, 1]


class Hybrid:
    """L_simple and L_vlb (Nichol & Dhariwal 2021, section 3.1) for `schedule.Discrete`."""

    def __init__(self, device: torch.device) -> None:
        process = schedule.discrete()
        self.last = process.T - 1
        a = process.alphas_cumprod
        before = np.append(1.0, a[:-1])
        posterior = (1 - before) / (1 - a) * process.betas
        posterior[0] = posterior[1]  # zero at the first step, where it is never the variance
        columns = np.stack(
            [
                a,
                np.log(process.betas),
                np.log(posterior),
                np.sqrt(before) * process.betas / (1 - a),  # of x0 in the posterior's mean
                np.sqrt(1 - process.betas) * (1 - before) / (1 - a),  # of x_t
            ],
            1,
        )
        self.table = torch.from_numpy(columns).to(device)

    def __call__(self, denoise: Denoise, x: Tensor, index: Tensor, eps: Tensor) -> PaperTerms:
        """`x` (B, 3, H, W) in [-1, 1], `index` (B,) in 0…T - 1 -> terms at those steps."""
        rows = self.table[index][:, :, None, None, None]
        a, log_beta, log_posterior, of_x0, of_x_t = rows.unbind(1)
        root, rest = a.sqrt().float(), (1 - a).sqrt().float()
        x_t = root * x + rest * eps
        out = denoise(x_t, index.float() / self.last)
        eps_hat, v = out.chunk(2, 1)
        x0 = ((x_t - rest * eps_hat) / root).clamp(-1, 1)
        fraction = (v + 1) / 2
        log_variance = fraction * log_beta.float() + (1 - fraction) * log_posterior.float()
        mean = of_x0.float() * x0.detach() + of_x_t.float() * x_t  # Nichol 2021: detached
        true = of_x0.float() * x + of_x_t.float() * x_t
        kl = _kl(true, log_posterior.float(), mean, log_variance)
        nll = -_log_likelihood(x, mean, log_variance)
        first = (index == 0)[:, None, None, None]
        vlb = torch.where(first, nll, kl).mean() * BITS * (self.last + 1)
        return PaperTerms((eps_hat - eps).square().mean(), vlb, x0)


def _kl(mean: Tensor, log_variance: Tensor, mean_hat: Tensor, log_variance_hat: Tensor) -> Tensor:
    """Of two Gaussians, in nats."""
    ratio = torch.exp(log_variance - log_variance_hat)
    apart = (mean - mean_hat).square() * torch.exp(-log_variance_hat)
    return 0.5 * (log_variance_hat - log_variance - 1 + ratio + apart)


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of 8-bit values in [-1, 1] under a discretised Gaussian (Ho 2020, eq. 13), in nats."""
    inverse = torch.exp(-0.5 * log_variance) * 2**-0.5
    above, below = ((x - mean + d / 255) * inverse for d in (1, -1))
    upper = torch.where(x > 0.999, 1.0, 0.5 * (1 + torch.erf(above)))
    lower = torch.where(x < -0.999, 0.0, 0.5 * (1 + torch.erf(below)))
    return (upper - lower).clamp(min=1e-12).log()
