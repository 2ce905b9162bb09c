"""Losses of the diffusion decoder, as functions of a denoiser with a fixed condition."""

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
from models.diffusion.schedule import SamplingStep
from models.geometry import STRIDE_Y

BITS = 1 / math.log(2)
"""Bits per nat."""
DCT = 8
"""Side of the blocks whose cosine transform `spectrum` takes, in pixels; blocks overlap by half."""
REGION = 8
"""Side of the regions over which `spectrum` averages power, in blocks: 36 pixels."""

Components = tuple[tuple[float, float, float], ...]
"""Weights of red, green and blue."""
_LUMA: Components = ((0.299, 0.587, 0.114),)
_CHROMA: Components = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""Colour differences Cb and Cr of BT.601, like the luma."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t (B,)) -> the network's prediction."""


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` times in [0, 1), one from each interval of length 1/n, in random order."""
    device = generator.device
    t = torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)
    t = (t / n).clamp(max=1 - 2**-24)  # float32 may round a sum near n up to n
    return t[torch.randperm(n, generator=generator, device=device)]


def middle(u: Tensor) -> Tensor:
    """Map uniform `u` in [0, 1) to times in [0, 1), three quarters of them in [.1, .7].

    At later times only the mean can be predicted; at earlier ones almost everything is decided.
    """
    return torch.maximum(torch.minimum(u, 0.02 + 0.8 * u), 2 * u - 1)


def denoising(denoise: Denoise, x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the v-loss, weighted by clamp(SNR, 1, 5) / (SNR + 1), and its value for predicting 0.

    Plain min-SNR-5 would be zero at t = 1, where every sampler starts.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    target = alpha * eps - sigma * x0
    v = denoise(alpha * x0 + sigma * eps, t)
    snr = (alpha / sigma.clamp(min=1e-4)) ** 2
    weight = snr.clamp(1, 5) / (snr + 1)
    zero = (weight * target.square()).mean()
    return (weight * (v - target).square()).mean(), zero.detach()


def rollout(denoise: Denoise, x_t: Tensor, steps: Sequence[SamplingStep]) -> Tensor:
    """Take DDIM steps from noise `x_t` (B, C, H, W). After all steps of a schedule, that is x0."""
    for step in steps:
        v = denoise(x_t, torch.full((len(x_t),), step.t, device=x_t.device))
        x0, eps = schedule.x0_from_v(x_t, v, step.a), schedule.eps_from_v(x_t, v, step.a)
        x_t = ddim_step(x0, eps, step.a, step.a_prev)
    return x_t


def spectrum(picture: Tensor, x: Tensor) -> Tensor:
    """Distance of the lumas' local power spectra (BT.601): mean |ln| of the ratio of amplitudes.

    `picture` and `x` are (B, 3, H, W) in [0, 1]; H and W are at least 36. The distance compares
    statistics of regions, not pixels: detail may move within a region, but missing detail and
    wrong texture increase the distance. So does a hatching with a period of four pixels. LPIPS on
    AlexNet rewards such a hatching, because AlexNet's first layer has stride 4.
    Related distances compare statistics of learned features (Ding 2020, DISTS; Qiu 2024,
    Wasserstein distortion). Here the features are fixed: cosines of 8×8 blocks, without the mean.
    """
    return _spectral_distance(picture, x, _LUMA)


def chroma_spectrum(picture: Tensor, x: Tensor) -> Tensor:
    """Distance that `spectrum` computes, of the colour differences Cb and Cr.

    Losses of luma move pixels along the weights of luma, mostly in green, and LPIPS hardly sees the
    colour noise that this adds: without this distance, Cb had up to four times too much power.
    """
    return _spectral_distance(picture, x, _CHROMA)


def _spectral_distance(picture: Tensor, x: Tensor, components: Components) -> Tensor:
    log_power, log_power_x = _by_region(_power(torch.cat([picture, x]), components)).log().chunk(2)
    return (log_power - log_power_x).abs().mean() / 2


def period(picture: Tensor, x: Tensor) -> Tensor:
    """Share of the error's power that repeats every 16 pixels, the stride of the latents.

    Mean over Y, Cb and Cr, without the means of 16×16 blocks. It is 1 / (number of blocks) on
    average for errors without a period. Flat areas have equal latents, from which the decoder can
    draw the same small pattern in each block. Takes what `spectrum` takes.
    """
    rows, columns = (side // STRIDE_Y for side in x.shape[2:])
    error = (picture - x)[:, :, : rows * STRIDE_Y, : columns * STRIDE_Y]
    error = F.conv2d(error, _components(x.device, _LUMA + _CHROMA))
    blocks = error.reshape(*error.shape[:2], rows, STRIDE_Y, columns, STRIDE_Y)
    blocks = blocks - blocks.mean((3, 5), keepdim=True)
    # detached: otherwise more noise without a period would lower the share
    power = blocks.square().mean((2, 3, 4, 5)).detach() + 255.0**-2
    share: Tensor = blocks.mean((2, 4)).square().mean((2, 3)) / power
    return share.mean()


def sparsity(picture: Tensor, x: Tensor) -> Tensor:
    """Distance of the lumas' local sparsity: mean |ln| of the ratio of (E|c|)² / E c².

    c are the cosines that `spectrum` compares, E their mean over a region. In photographs a few of
    them are large, at edges; in noise of the same power they are all alike. The quotient is the
    moment from which NIQE fits the shape of a generalised Gaussian. Takes what `spectrum` takes.
    """
    power = _power(torch.cat([picture, x]), _LUMA)
    sparsity, sparsity_x = (_by_region(power.sqrt()).square() / _by_region(power)).log().chunk(2)
    return (sparsity - sparsity_x).abs().mean()


def scene_statistics(picture: Tensor, x: Tensor) -> Tensor:
    """Distance of the lumas' natural scene statistics: half the mean |ln| of ratios of moments.

    The moments are those from which NIQE fits its features (Mittal 2013): of the luma normalised by
    local mean and contrast, and of the products of neighbours in four directions, at full and half
    size, here over the whole crop. They are larger on one side where edges have a direction, which
    `spectrum` and `sparsity` cannot see. Takes what `spectrum` takes.
    """
    luma = F.conv2d(torch.cat([picture, x]), _components(x.device, _LUMA)) * 255
    moments = [_scene_moments(luma), _scene_moments(F.avg_pool2d(luma, 2))]
    ours, theirs = torch.cat(moments, 1).log().chunk(2)
    return (ours - theirs).abs().mean() / 2


def _scene_moments(luma: Tensor) -> Tensor:
    """`luma` (B, 1, H, W), 0 to 255 -> moments (B, 14) of normalised values and products.

    E p² of the values; (E|p|)² / E p² of the values and of the four products; E p² of the negative
    and of the positive products.
    """
    smooth = functools.partial(F.conv2d, weight=_scene_window(luma.device))
    centred = luma - luma.mean((2, 3), keepdim=True)  # float32 loses digits in squares of 255
    mean = smooth(centred)
    contrast = ((smooth(centred.square()) - mean.square()).clamp(min=0) + 1e-2).sqrt()
    n = (centred[:, :, 3:-3, 3:-3] - mean) / (contrast + 1)
    right, below = n[:, :, :, :-1] * n[:, :, :, 1:], n[:, :, :-1] * n[:, :, 1:]
    falling, rising = n[:, :, :-1, :-1] * n[:, :, 1:, 1:], n[:, :, :-1, 1:] * n[:, :, 1:, :-1]
    moments = [n.square().mean((1, 2, 3))]
    for p in (n, right, below, falling, rising):
        power = p.square().mean((1, 2, 3)) + 1e-4
        moments.append(p.abs().mean((1, 2, 3)).square() / power)
    for p in (right, below, falling, rising):
        moments += [side.square().mean((1, 2, 3)) for side in (p.clamp(max=0), p.clamp(min=0))]
    return torch.stack(moments, 1) + 1e-4


@functools.cache
def _scene_window(device: torch.device) -> Tensor:
    """Kernel (1, 1, 7, 7): NIQE's Gaussian with a standard deviation of 7/6 pixels."""
    line = torch.exp(-0.5 * (torch.arange(-3, 4, dtype=torch.float64) * 6 / 7).square())
    window = line * line[:, None]
    return (window / window.sum())[None, None].float().to(device)


def _power(x: Tensor, components: Components) -> Tensor:
    """Squares of the components' cosines in overlapping blocks, (B, 63·components, h, w).

    The offset, one grey level squared, makes differences below it count little.
    """
    return F.conv2d(x, _cosines(x.device, components), stride=DCT // 2).square() + 255.0**-2


def _by_region(values: Tensor) -> Tensor:
    return F.avg_pool2d(values, REGION, REGION // 2)


@functools.cache
def _cosines(device: torch.device, components: Components) -> Tensor:
    """Kernels (63·components, 3, 8, 8) of the orthonormal 8×8 DCT-II without the mean."""
    k = torch.arange(DCT, dtype=torch.float64)
    rows = torch.cos(math.pi / DCT * (k + 0.5) * k[:, None]) * math.sqrt(2 / DCT)
    rows[0] /= math.sqrt(2)
    cosines = torch.einsum("ij,kl->ikjl", rows, rows).reshape(-1, 1, DCT, DCT)[1:]
    weights = _components(device, components).double()
    return torch.cat([weight * cosines for weight in weights]).float().to(device)


@functools.cache
def _components(device: torch.device, components: Components) -> Tensor:
    """Kernels (components, 3, 1, 1)."""
    return torch.tensor(components, device=device)[:, :, None, None]


@dataclass(frozen=True, slots=True)
class PaperTerms:
    """Terms of Nichol & Dhariwal's hybrid loss, and the predicted picture."""

    simple: Tensor  # mean squared error of eps; 1 for predicting zero
    vlb: Tensor  # bits per dimension of all T steps; its gradient is that of the variance only
    x0: Tensor  # (B, 3, H, W) in [-1, 1]


class Hybrid:
    """L_simple and L_vlb (Nichol & Dhariwal 2021, section 3.1) for `schedule.Discrete`."""

    def __init__(self, device: torch.device) -> None:
        process = schedule.discrete()
        self.last = process.T - 1
        a = process.alphas_cumprod
        a_prev = np.append(1.0, a[:-1])
        posterior = (1 - a_prev) / (1 - a) * process.betas
        posterior[0] = posterior[1]  # the first is zero, whose logarithm is infinite; not used
        columns = np.stack(
            [
                a,
                np.log(process.betas),
                np.log(posterior),
                np.sqrt(a_prev) * process.betas / (1 - a),  # weight of x0 in the posterior's mean
                np.sqrt(1 - process.betas) * (1 - a_prev) / (1 - a),  # weight of x_t in it
            ],
            1,
        )
        self.table = torch.from_numpy(columns).to(device)

    def __call__(self, denoise: Denoise, x: Tensor, index: Tensor, eps: Tensor) -> PaperTerms:
        """Return the terms at steps `index` (B,), 0 to T - 1, for `x` (B, 3, H, W) in [-1, 1]."""
        rows = self.table[index][:, :, None, None, None]
        a, log_beta, log_posterior, weight_x0, weight_x_t = rows.unbind(1)
        root, rest = a.sqrt().float(), (1 - a).sqrt().float()
        x_t = root * x + rest * eps
        out = denoise(x_t, index.float() / self.last)
        eps_hat, v = out.chunk(2, 1)
        x0 = ((x_t - rest * eps_hat) / root).clamp(-1, 1)
        fraction = (v + 1) / 2
        log_variance = fraction * log_beta.float() + (1 - fraction) * log_posterior.float()
        mean = weight_x0.float() * x0.detach() + weight_x_t.float() * x_t  # as in Nichol 2021
        true_mean = weight_x0.float() * x + weight_x_t.float() * x_t
        kl = _kl(true_mean, log_posterior.float(), mean, log_variance)
        nll = -_log_likelihood(x, mean, log_variance)
        first = (index == 0)[:, None, None, None]
        vlb = torch.where(first, nll, kl).mean() * BITS * (self.last + 1)
        return PaperTerms((eps_hat - eps).square().mean(), vlb, x0)


def _kl(mean: Tensor, log_variance: Tensor, mean_hat: Tensor, log_variance_hat: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two Gaussians, in nats."""
    ratio = torch.exp(log_variance - log_variance_hat)
    distance = (mean - mean_hat).square() * torch.exp(-log_variance_hat)
    return 0.5 * (log_variance_hat - log_variance - 1 + ratio + distance)


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-likelihood of 8-bit values in [-1, 1] under a discretised Gaussian, in nats.

    Equation 13 of Ho 2020.
    """
    inverse = torch.exp(-0.5 * log_variance) * 2**-0.5
    above, below = ((x - mean + d / 255) * inverse for d in (1, -1))
    upper = torch.where(x > 0.999, 1.0, 0.5 * (1 + torch.erf(above)))
    lower = torch.where(x < -0.999, 0.0, 0.5 * (1 + torch.erf(below)))
    return (upper - lower).clamp(min=1e-12).log()
