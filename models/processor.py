"""What the CPU can compute, and in which precision it shall."""

import functools
import os
from collections.abc import Set
from pathlib import Path

from models.errors import ParameterError

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def has_bfloat16() -> bool:
    """Return True if the CPU has x86-64 instructions that multiply bfloat16 (AVX-512 BF16, AMX).

    Without them torch emulates bfloat16, which is slower than float32.
    """
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags())


def flags() -> Set[str]:
    """Return the names of the CPU's features as Linux gives them; none on other systems."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def precision(variable: str, *choices: str) -> str:
    """Return the precision that an environment variable names; the first choice if it is empty.

    Raises `ParameterError` if it names none of `choices`.
    """
    value = os.environ.get(variable) or choices[0]
    if value not in choices:
        raise ParameterError(f"{variable}={value}: choose {', '.join(choices)}")
    return value
