"""Standard normals from a counter-based generator: Philox 4x32-10 (Salmon 2011) and Box-Muller.

A value depends only on seed, step and position, not on batch, window, worker or device. The
integers are identical on every device, the normals agree to 1e-6.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROWS = 64
"""Rows per pass, so that the 64-bit counters fit into the CPU's cache."""


def normals(
    seed: int,
    step: int,
    shape: tuple[int, int, int],
    origin: tuple[int, int] = (0, 0),
    device: torch.device | None = None,
) -> Tensor:
    """Draw standard normals (1, C, H, W) for `shape` (C, H, W), with C at most 4.

    `origin` is the (y, x) position of the top left value: a window of a larger picture gets the
    values of the whole picture there. `seed` is in 0…2^64 - 1.
    """
    channels, height, width = shape
    out = torch.empty(shape, device=device)
    for top in range(0, height, _ROWS):
        rows = min(_ROWS, height - top)
        integers = words(seed, step, (rows, width), (origin[0] + top, origin[1]), device)
        uniform = (integers.double() + 0.5) * 2.0**-32  # (4, rows, W) in (0, 1)
        radius = torch.sqrt(-2 * torch.log(uniform[::2]))
        angle = 2 * math.pi * uniform[1::2]
        strip = out[:, top : top + rows]
        strip[:2] = (radius * torch.cos(angle))[:channels]
        strip[2:] = (radius * torch.sin(angle))[: max(channels - 2, 0)]
    return out[None]


def words(
    seed: int,
    step: int,
    size: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
    device: torch.device | None = None,
) -> Tensor:
    """Philox's four 32-bit words per position: (4, H, W) int64; the counter is (y, x, step, 0)."""
    # the first rounds combine rows, columns and constants, which are broadcast only then
    c0 = torch.arange(origin[0], origin[0] + size[0], device=device)[:, None]
    c1 = torch.arange(origin[1], origin[1] + size[1], device=device)[None]
    c2, c3 = c0.new_full((1, 1), step), c0.new_zeros(1, 1)
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        # int64 products wrap modulo 2^64, as Philox requires; `& _WORD` removes the shift's sign
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ (c1 ^ k0),
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ (c3 ^ k1),
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3])  # after ten rounds all are (H, W)
