"""CompressAI, which tests compare ours with where it can be installed."""

import sys
from importlib.util import find_spec
from typing import Any, TypeAlias

import pytest

Reference: TypeAlias = Any
"""A `compressai.models.MeanScaleHyperprior`, which has no types."""


AVAILABLE = sys.version_info < (3, 13) or find_spec("compressai") is not None
"""Whether CompressAI must be installed, or is. There are no wheels for Python 3.13 and later."""
REASON = (
    "CompressAI has no wheels for Python 3.13 and later: "
    "tests with the marker compressai are deselected"
)


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture `compressai`, and deselect the marked ones without it."""
    for item in items:
        if "compressai" in getattr(item, "fixturenames", ()):
            item.add_marker("compressai")
    if not AVAILABLE:
        config.hook.pytest_deselected(items=[i for i in items if _is_marked(i)])
        items[:] = [item for item in items if not _is_marked(item)]


def _is_marked(item: pytest.Item) -> bool:
    return item.get_closest_marker("compressai") is not None


def mean_scale_hyperprior(n: int, m: int) -> Reference:
    """The network with random weights, `n` channels of z and `m` of y.

    CompressAI is imported here: it takes seconds, which only the tests that need it should spend.
    """
    from compressai.models import MeanScaleHyperprior

    return MeanScaleHyperprior(n, m)
