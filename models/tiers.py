"""Tiers: named sampler settings, and the ranges within which a request may change them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from models.errors import ParameterError

MAX_STEPS = 1000
MAX_SEED = 2**64 - 1
MAX_GUIDANCE = 4.0

Sampler = Literal["ddim", "ddpm", "dpmpp-2m"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Settings:
    """Sampler settings of a diffusion picture. Raises `ParameterError` for values out of range."""

    sampler: Sampler
    steps: int  # cost is linear in this
    eta: float = 0.0  # 0: deterministic; 1: the DDPM posterior's variance
    gamma: float = 1.0  # scale of the initial noise
    beta: float = 0.0  # 0: a sample of the posterior; 1: the few-step perceptual decoder
    guidance: float = 1.0  # scale of autoguidance; 1: off, otherwise a step costs two calls

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise ParameterError(
                f"sampler is {self.sampler!r}; choose one of {', '.join(get_args(Sampler))}"
            )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ParameterError(f"steps is {self.steps}; choose 1 to {MAX_STEPS}")
        for name in ("eta", "beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ParameterError(f"{name} is {value}; choose 0 to 1")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ParameterError(f"guidance is {self.guidance}; choose 0 to {MAX_GUIDANCE}")
        if self.sampler != "ddim" and self.eta:
            raise ParameterError(
                f"eta is {self.eta}, but only the sampler ddim has an eta; "
                f"leave it out, or set it to 0, for {self.sampler}"
            )
        for name in ("eta", "gamma", "beta", "guidance"):  # may be integers
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def calls(self) -> int:
        """Number of denoiser calls per picture. Decoding time is proportional to it."""
        return self.steps * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True, slots=True)
class Tier:
    """A named choice between low distortion and realism. `settings` is None for `instant`."""

    name: str
    settings: Settings | None
    description: str


TIERS = {
    tier.name: tier
    for tier in (
        Tier("instant", None, "The picture of the codec itself: lowest distortion, ready at once."),
        Tier(
            "perceptual",
            Settings("ddim", 1, beta=1.0),
            "One step, trained for natural looks: the recommended diffusion tier.",
        ),
        Tier("ddim-10", Settings("ddim", 10), "DDIM, 10 steps: a fast sample from the posterior."),
        Tier("ddim-100", Settings("ddim", 100), "DDIM, 100 steps."),
        Tier("ddpm-100", Settings("ddpm", 100), "DDPM ancestral sampling, 100 steps."),
        Tier("ddpm-1000", Settings("ddpm", 1000), "DDPM ancestral sampling, 1000 steps."),
    )
}


def find(name: str) -> Tier:
    """Return the tier called `name`. Raises `ParameterError`, which lists all tiers."""
    if name not in TIERS:
        raise ParameterError(f"unknown tier {name!r}; choose one of {', '.join(TIERS)}")
    return TIERS[name]


def decoder_for(decoders: Mapping[int, _T], settings: Settings) -> _T:
    """Choose a diffusion decoder: one for this number of steps at beta 1, else the general one.

    The keys are the numbers of steps that decoders were trained for; that of the general one is 0.
    """
    special = settings.sampler == "ddim" and settings.beta == 1
    return decoders.get(settings.steps if special else 0, decoders[0])


def vary(settings: Settings, **changes: Sampler | float | None) -> Settings:
    """Return `settings` with `changes` applied; fields that are None stay as they are.

    Raises `ParameterError` for values out of range.
    """
    values: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
    return replace(settings, **values)


def check_seed(seed: int) -> int:
    """Return `seed`. Raises `ParameterError` unless it is within 0…2^64 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ParameterError(f"seed is {seed}; choose 0 to {MAX_SEED}")
    return seed


def check_realism(alpha: float) -> float:
    """Return `alpha`. Raises `ParameterError` unless it is within 0…1."""
    if not 0 <= alpha <= 1:
        raise ParameterError(f"realism is {alpha}; choose 0 to 1")
    return alpha
