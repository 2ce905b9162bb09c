"""Does the denoiser err as much as it says? Predicted against actual error over time."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models import tiles
from models.codec import codec
from models.diffusion.decoder import DiffusionInput
from models.diffusion.sampler import Denoise
from models.diffusion.schedule import Step
from models.geometry import STRIDE_Y

POINTS = 16
"""Parts of the time from 0 to 1; both ends are left out."""
SIDE = 256
"""Pixels along the square, in a picture's middle, that is looked at."""
_ALIGNED = 64
_PROBE = 0.01
"""Length of a probe, in units of x_t's standard deviation."""


@dataclass(frozen=True, slots=True)
class Point:
    """Mean squared errors of x0 at time `t`, in its units (the compact presets': of the codec's).

    `predicted` is the variance that the denoiser implies, `actual` its error, `zero` that of the
    estimate 0: for the compact presets the codec's picture.
    """

    t: float
    predicted: float
    actual: float
    zero: float


def curve(
    denoise: Denoise, x0: Tensor, steps: Iterable[Step], generator: torch.Generator
) -> list[Point]:
    """A point for each step, each from noise of its own; `x0` (B, C, H, W).

    A denoiser that is the posterior mean has Cov[x0 | x_t] = (1 - a) / sqrt(a) d x0^ / d x_t
    (Tweedie's formula, second order; Efron 2011): its trace is estimated by one difference along a
    random sign vector (Hutchinson 1989). An actual error above it is overconfidence.
    """
    points = []
    for step in steps:
        x_t = step.a**0.5 * x0 + (1 - step.a) ** 0.5 * torch.randn(x0.shape, generator=generator)
        signs = torch.randint(0, 2, x0.shape, generator=generator) * 2.0 - 1
        estimate = denoise(x_t, step.t, step.a).x0
        moved = denoise(x_t + _PROBE * signs, step.t, step.a).x0
        slope = float((signs * (moved - estimate)).mean()) / _PROBE
        predicted = (1 - step.a) / step.a**0.5 * slope
        actual = float((estimate - x0).square().mean())
        points.append(Point(step.t, predicted, actual, float(x0.square().mean())))
    return points


def middle(draft: DiffusionInput, x: Tensor) -> tuple[DiffusionInput, Tensor] | None:
    """The middle of a draft and of its original `x` (1, 3, H, W); None where there is too little.

    At most `SIDE` pixels square, on the latents' grid and without padding, which the draft has.
    """
    height, width = (min(SIDE, n // _ALIGNED * _ALIGNED) for n in x.shape[2:])
    if not height or not width:
        return None
    x = codec.pad(x)
    top = (x.shape[2] - height) // 2 // STRIDE_Y
    left = (x.shape[3] - width) // 2 // STRIDE_Y
    spot = (top, top + height // STRIDE_Y, left, left + width // STRIDE_Y)
    window, latents = tiles.Window(spot, spot), draft.latents
    x_hat, y_hat, near = tiles.cut(window, [draft.x_hat, latents.y_hat, x], [1, STRIDE_Y, 1])
    latents = replace(latents, y_hat=y_hat, bits=latents.bits[window.reads(1)[-2:]])
    return replace(draft, latents=latents, x_hat=x_hat), near


def mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Of several pictures, at the same times."""
    figures = np.mean([[astuple(point) for point in points] for points in curves], axis=0)
    return [Point(*row) for row in figures.tolist()]
