"""Sizes of pictures: limits, padding, and the grids of the latents."""

from models.errors import LengthMismatch, PictureTooLarge

MAX_PIXELS = 20_000_000
"""Default limit on declared pixels: the diffusion decoder takes about 0.3 GB a megapixel."""
MAX_SIDE = 16_384
"""Limit on either side: what is computed is padded to multiples of 64 pixels."""
STRIDE_Z = 64
"""Pixels between two positions of z, in either format."""
STRIDE_Y = 16
"""Pixels between two positions of `y`."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse more than `max_pixels`, and sides whose padding would be many times the picture.

    Raises `PictureTooLarge`, `LengthMismatch` for an empty picture.
    """
    if not height or not width:
        raise LengthMismatch(f"a picture of {width}×{height} pixels")
    if height * width > max_pixels:
        raise PictureTooLarge(f"{width}×{height} pixels; the limit is {max_pixels}")
    if max(height, width) > MAX_SIDE:
        raise PictureTooLarge(f"{width}×{height} pixels; the limit of a side is {MAX_SIDE}")


def padded(height: int, width: int) -> tuple[int, int]:
    """The coded size of a picture: both sides up to the next multiple of 64."""
    return -(-height // STRIDE_Z) * STRIDE_Z, -(-width // STRIDE_Z) * STRIDE_Z


def megapixels(height: int, width: int) -> float:
    """Of the coded size, which is what a picture costs: one of 16384×1 as much as of 16384×64."""
    rows, columns = padded(height, width)
    return rows * columns / 1e6


def origin(height: int, width: int) -> tuple[int, int]:
    """Row and column at which the picture begins within its padded self."""
    full = padded(height, width)
    return (full[0] - height) // 2, (full[1] - width) // 2
