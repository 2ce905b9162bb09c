"""Tiers: public names of sampler settings, and the limits within which a request may vary them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from models.errors import ParameterError

MAX_STEPS = 1000
MAX_SEED = 2**64 - 1

MAX_GUIDANCE = 4.0

Sampler = Literal["ddim", "ddpm", "dpmpp-2m"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a diffusion picture is drawn.

    Raises `ParameterError` where a value lies outside its range.
    """

    sampler: Sampler
    steps: int  # cost is linear in this
    eta: float = 0.0  # 0: deterministic; 1: the DDPM posterior's variance
    gamma: float = 1.0  # scale of the initial noise
    beta: float = 0.0  # 0: a sample of the posterior; 1: the few-step perceptual decoder
    guidance: float = (
        1.0  # autoguidance by the network without latents; off at 1, else twice the cost
    )

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ParameterError(f"steps is {self.steps}; 1 to {MAX_STEPS} are allowed")
        for name in ("eta", "beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ParameterError(f"{name} is {value}; 0 to 1 is allowed")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ParameterError(f"guidance is {self.guidance}; 0 to {MAX_GUIDANCE} is allowed")
        if self.sampler != "ddim" and self.eta:
            raise ParameterError(f"eta belongs to ddim; {self.sampler}'s noise is fixed")

    @property
    def calls(self) -> int:
        """Denoiser calls in all: what the picture costs."""
        return self.steps * (1 if self.guidance == 1 else 2)


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


def vary(settings: Settings, **asked: Sampler | float | None) -> Settings:
    """`settings` with the fields that are asked for; None leaves one as it is.

    Raises `ParameterError`.
    """
    changed: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    return replace(settings, **changed)


def check_seed(seed: int) -> int:
    """`seed` itself; `ParameterError` outside 0…2^64 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ParameterError(f"seed is {seed}; 0 to {MAX_SEED} are allowed")
    return seed


def check_realism(alpha: float) -> float:
    """`alpha` itself; `ParameterError` outside 0…1."""
    if not 0 <= alpha <= 1:
        raise ParameterError(f"realism is {alpha}; 0 to 1 is allowed")
    return alpha
