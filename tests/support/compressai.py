"""CompressAI's network, which tests compare ours with."""

from typing import Any, TypeAlias

Reference: TypeAlias = Any
"""A `compressai.models.MeanScaleHyperprior`, which has no types."""


def mean_scale_hyperprior(n: int, m: int) -> Reference:
    """The network with random weights, `n` channels of z and `m` of y.

    CompressAI is imported here: it takes seconds, which only the tests that need it should spend.
    """
    from compressai.models import MeanScaleHyperprior

    return MeanScaleHyperprior(n, m)
