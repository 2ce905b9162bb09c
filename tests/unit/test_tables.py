"""CDF tables equal those of CompressAI's `update()`, integer by integer."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.codec import tables
from models.codec.architectures import ARCHITECTURES
from models.train.entropy import EntropyBottleneck

PROBABILITIES = arrays.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(0, 1, width=32) | st.floats(0, 2.0**-15, width=32) | st.just(0.0),
)


def in_state(module: Any, part: str) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value.detach() for name, value in module.state_dict().items()}


@pytest.mark.compressai
@given(PROBABILITIES)
@settings(deadline=None)  # the first call compiles
def test_a_cdf_equals_that_of_compressai(pmf: Any) -> None:
    from compressai.entropy_models.entropy_models import pmf_to_quantized_cdf

    try:
        theirs = pmf_to_quantized_cdf(torch.from_numpy(pmf)).numpy()
    except (ValueError, AssertionError):
        with pytest.raises(ValueError):
            tables.quantized_cdf(pmf)
    else:
        assert np.array_equal(tables.quantized_cdf(pmf), theirs)


@pytest.mark.parametrize("wrong", [[0.5, -0.1], [np.nan, 0.5], [np.inf], [0, 0]])
def test_probabilities_that_give_no_cdf_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="probabilit"):
        tables.quantized_cdf(np.array(wrong, np.float32))


@pytest.mark.compressai
def test_the_tables_of_the_gaussian_conditional_equal_those_of_compressai() -> None:
    """They do not depend on the architecture or the quality."""
    from compressai.entropy_models import GaussianConditional
    from compressai.models.base import get_scale_table

    theirs = GaussianConditional(None)
    theirs.update_scale_table(get_scale_table())
    state = in_state(theirs, tables.Y)
    ours = tables.gaussian()
    assert set(ours) == set(tables.names(tables.Y))
    for name, value in ours.items():
        assert torch.equal(value, state[name]), name


WIDTHS = sorted(
    {n if a.prior != "factorized" else m for a in ARCHITECTURES.values() for n, m in a.channels}
)


@pytest.mark.compressai
@given(st.sampled_from(WIDTHS), st.integers(0, 2**32), st.floats(0.1, 20), st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_the_tables_of_the_entropy_bottleneck_equal_those_of_compressai(
    channels: int, seed: int, spread: float, noise: float
) -> None:
    """For every number of channels that an architecture has at some quality."""
    from compressai.entropy_models import EntropyBottleneck as Theirs

    torch.manual_seed(seed)
    theirs = Theirs(channels, init_scale=spread)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(noise * torch.randn_like(p))
        theirs.quantiles.copy_(theirs.quantiles.sort(-1).values)
    parameters = in_state(theirs, tables.Z)
    try:
        theirs.update()
    except ValueError:  # a channel whose probability lies outside its quantiles
        with pytest.raises(ValueError, match="probabilities are 0"):
            tables.factorized(parameters)
        return
    state = in_state(theirs, tables.Z)
    ours = tables.factorized(parameters)
    assert set(ours) == set(tables.names(tables.Z))
    for name, value in ours.items():
        assert torch.equal(value, state[name]), name


def test_quantiles_that_span_too_many_values_are_refused() -> None:
    part = EntropyBottleneck(2)
    with torch.no_grad():
        part.quantiles[:, :, 2] = 1e9
    with pytest.raises(ValueError, match="too many for a CDF"):
        tables.factorized(in_state(part, tables.Z))
