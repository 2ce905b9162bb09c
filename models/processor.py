"""What the CPU can compute."""

import functools
from collections.abc import Set
from pathlib import Path

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
