"""Tiers, and the ranges of sampler settings."""

import math

import pytest

from models.errors import ParameterError
from models.tiers import TIERS, Settings, check_seed, decoder_for, find


def test_the_public_tiers_have_their_documented_steps() -> None:
    assert {t.name: t.settings.steps for t in TIERS.values() if t.settings} == {
        "perceptual": 1, "ddim-10": 10, "ddim-100": 100, "ddpm-100": 100, "ddpm-1000": 1000
    }  # fmt: skip
    assert find("perceptual").settings is not None
    with pytest.raises(ParameterError, match="perceptual"):
        find("best")


def test_guidance_adds_a_second_denoiser_call_per_step() -> None:
    assert Settings("ddim", 10).calls == 10
    assert Settings("ddim", 10, guidance=1.5).calls == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "euler"},
        {"steps": 0},
        {"steps": 1001},
        {"eta": 1.1},
        {"beta": -0.1},
        {"gamma": math.nan},
        {"guidance": 4.1},
        {"guidance": math.nan},
        {"sampler": "ddpm", "eta": 0.5},
        {"sampler": "dpmpp-2m", "eta": 0.5},
    ],
)
def test_settings_outside_their_ranges_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        Settings(**{"sampler": "ddim", "steps": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(ParameterError):
        check_seed(seed)


def test_the_decoder_for_so_many_steps_at_beta_1_is_chosen() -> None:
    decoders = {0: "general", 1: "one step"}
    assert TIERS["perceptual"].settings is not None
    assert decoder_for(decoders, TIERS["perceptual"].settings) == "one step"
    assert decoder_for(decoders, Settings("ddim", 1, beta=1, guidance=2)) == "one step"
    for settings in (
        Settings("ddim", 1), Settings("ddim", 1, beta=0.9), Settings("ddim", 4, beta=1),
        Settings("dpmpp-2m", 1, beta=1), Settings("ddpm", 1, beta=1),
    ):  # fmt: skip
        assert decoder_for(decoders, settings) == "general"
