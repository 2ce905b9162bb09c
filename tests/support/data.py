"""The test photograph and its bitstream, and how similar two pictures are."""

from pathlib import Path

import numpy as np

from models import image

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
PHOTO = DATA / "kodim23.png"


def psnr(a: image.Pixels, b: image.Pixels) -> float:
    """The peak signal-to-noise ratio in dB; infinite for equal pictures."""
    mse = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / mse)) if mse else float("inf")
