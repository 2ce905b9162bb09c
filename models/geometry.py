"""Picture sizes: limits, padding to the grids of the latents, position within the padding.

A codec works on sides that are multiples of 64 pixels: one position of z covers 64×64 pixels, one
position of y 16×16. Other sides are padded up to the next multiple, equally at both ends, as
CompressAI does.
"""

from models.errors import LengthMismatch, PictureTooLarge

MAX_PIXELS = 20_000_000
"""Default limit on a picture's pixels. The diffusion decoder needs about 0.3 GB per megapixel."""
MAX_SIDE = 16_384
"""Limit on height and width: padding of a very thin picture costs many times its own pixels."""
STRIDE_Z = 64
"""Pixels between two neighbouring positions of z."""
STRIDE_Y = 16
"""Pixels between two neighbouring positions of y."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Check a picture's declared size, in pixels.

    Raises `LengthMismatch` if a side is 0, `PictureTooLarge` if the picture has more than
    `max_pixels` or a side is longer than `MAX_SIDE`.
    """
    if not height or not width:
        raise LengthMismatch(
            f"the picture has {width}×{height} pixels; both sides must be 1 or more"
        )
    if height * width > max_pixels:
        error = PictureTooLarge(
            f"the picture has {width}×{height} pixels; the limit is {max_pixels} in all "
            "(AFTERIMAGE_MAX_PIXELS)"
        )
        error.pixels = height * width
        raise error
    if max(height, width) > MAX_SIDE:
        raise PictureTooLarge(
            f"the picture has {width}×{height} pixels; the limit for each side is {MAX_SIDE}"
        )


def padded(height: int, width: int) -> tuple[int, int]:
    """Return the coded height and width: each side rounded up to a multiple of 64."""
    return -(-height // STRIDE_Z) * STRIDE_Z, -(-width // STRIDE_Z) * STRIDE_Z


def megapixels(height: int, width: int) -> float:
    """Return the megapixels of the coded (padded) size, to which decoding time is proportional.

    A 16384×1 picture counts as 16384×64.
    """
    rows, columns = padded(height, width)
    return rows * columns / 1e6


def origin(height: int, width: int) -> tuple[int, int]:
    """Return row and column of the picture's top left pixel within the padded picture."""
    rows, columns = padded(height, width)
    return (rows - height) // 2, (columns - width) // 2
