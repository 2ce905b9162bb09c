"""Calibration of the denoiser: its predicted error against its actual error over time."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models import tiles
from models.codec import codec
from models.diffusion.decoder import DiffusionInput
from models.diffusion.sampler import Denoise
from models.diffusion.schedule import SamplingStep
from models.geometry import STRIDE_Y

POINTS = 16
"""Number of equal parts of the time from 0 to 1. Both ends are left out."""
SIDE = 256
"""Side in pixels of the square that is measured, in the middle of a picture."""
_ALIGNED = 64
"""The square's sides are multiples of this, in pixels."""
_PROBE = 0.01
"""Length of a finite difference, in standard deviations of x_t."""


@dataclass(frozen=True, slots=True)
class Point:
    """Mean squared errors of x0 at time `t`, in the units of x0.

    `predicted` is the posterior variance that the denoiser implies, `actual` is the denoiser's
    error, and `zero` the error of predicting x0 = 0 (for the compact presets: the codec's picture).
    """

    t: float
    predicted: float
    actual: float
    zero: float


def curve(
    denoise: Denoise, x0: Tensor, steps: Iterable[SamplingStep], generator: torch.Generator
) -> list[Point]:
    """Measure one point per step, each with fresh noise; `x0` is (B, C, H, W).

    A denoiser that is the posterior mean has Cov[x0 | x_t] = (1 - a) / sqrt(a) d x0^ / d x_t
    (second-order Tweedie formula; Efron 2011). The trace is estimated by a finite difference along
    a random sign vector (Hutchinson 1989). An actual error above it means overconfidence.
    """
    points = []
    for step in steps:
        x_t = step.a**0.5 * x0 + (1 - step.a) ** 0.5 * torch.randn(x0.shape, generator=generator)
        signs = torch.randint(0, 2, x0.shape, generator=generator) * 2.0 - 1
        estimate = denoise(x_t, step.t, step.a).x0
        probed = denoise(x_t + _PROBE * signs, step.t, step.a).x0
        slope = float((signs * (probed - estimate)).mean()) / _PROBE
        predicted = (1 - step.a) / step.a**0.5 * slope
        actual = float((estimate - x0).square().mean())
        points.append(Point(step.t, predicted, actual, float(x0.square().mean())))
    return points


def middle(item: DiffusionInput, x: Tensor) -> tuple[DiffusionInput, Tensor] | None:
    """Cut the middle out of `item` and of its original `x` (1, 3, H, W).

    The cut has sides of at most `SIDE` pixels, lies on the latents' grid and excludes the padding
    of `item`. None if a side of `x` is below 64 pixels.
    """
    height, width = (min(SIDE, n // _ALIGNED * _ALIGNED) for n in x.shape[2:])
    if not height or not width:
        return None
    x = codec.pad(x)
    top = (x.shape[2] - height) // 2 // STRIDE_Y
    left = (x.shape[3] - width) // 2 // STRIDE_Y
    edges = (top, top + height // STRIDE_Y, left, left + width // STRIDE_Y)
    window, latents = tiles.Window(edges, edges), item.latents
    x_hat, y_hat, x_cut = tiles.cut(window, [item.x_hat, latents.y_hat, x], [1, STRIDE_Y, 1])
    latents = replace(latents, y_hat=y_hat, bits=latents.bits[window.reads(1)[-2:]])
    return replace(item, latents=latents, x_hat=x_hat), x_cut


def mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Average the curves of several pictures, measured at the same times."""
    figures = np.mean([[astuple(point) for point in points] for points in curves], axis=0)
    return [Point(*row) for row in figures.tolist()]
