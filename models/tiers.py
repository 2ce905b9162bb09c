"""Tiers: public names of sampler settings, and the limits within which a request may vary them."""

from dataclasses import dataclass
from typing import Literal

from models.errors import ParameterError

MAX_STEPS = 1000
MAX_SEED = 2**64 - 1

Sampler = Literal["ddim", "ddpm"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a diffusion picture is drawn.

    Raises `ParameterError` where a value lies outside its range.
    """

    sampler: Sampler
    steps: int  # denoiser calls: cost is linear in this
    eta: float = 0.0  # 0: deterministic; 1: the DDPM posterior's variance
    gamma: float = 1.0  # scale of the initial noise
    beta: float = 0.0  # 0: a sample of the posterior; 1: the few-step perceptual decoder

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ParameterError(f"steps is {self.steps}; 1 to {MAX_STEPS} are allowed")
        for name in ("eta", "beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ParameterError(f"{name} is {value}; 0 to 1 is allowed")
        if self.sampler == "ddpm" and self.eta:
            raise ParameterError("eta belongs to ddim; ddpm's noise is fixed")


@dataclass(frozen=True, slots=True)
class Tier:
    """A published point on the distortion-perception curve; `settings` is None for `instant`."""

    name: str
    settings: Settings | None
    description: str


TIERS = {
    tier.name: tier
    for tier in (
        Tier("instant", None, "The codec's own synthesis: lowest distortion, in the same request."),
        Tier(
            "perceptual",
            Settings("ddim", 4, beta=1.0),
            "The default upgrade: best looking picture per second.",
        ),
        Tier("ddim-10", Settings("ddim", 10), "DDIM, 10 steps: a fast posterior sample."),
        Tier("ddim-100", Settings("ddim", 100), "DDIM, 100 steps."),
        Tier("ddpm-100", Settings("ddpm", 100), "DDPM ancestral sampling, 100 steps."),
        Tier("ddpm-1000", Settings("ddpm", 1000), "DDPM ancestral sampling, 1000 steps."),
    )
}


def find(name: str) -> Tier:
    """The tier of this name; `ParameterError` lists the known ones where there is none."""
    if name not in TIERS:
        raise ParameterError(f"unknown tier {name!r}; known: {', '.join(TIERS)}")
    return TIERS[name]


def check_seed(seed: int) -> int:
    """`seed` itself; `ParameterError` outside 0…2^64 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ParameterError(f"seed is {seed}; 0 to {MAX_SEED} are allowed")
    return seed
