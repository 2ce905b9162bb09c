"""Jobs for runs under faults."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models import image
from models.codec import bitstream, codec, zoo

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
TIERS_TRIED = ("perceptual", "ddim-10", "ddim-100", "ddpm-100")


@dataclass(slots=True)
class Job:
    """A job submitted over HTTP, and its result."""

    data: bytes
    asked: dict[str, str | int]
    location: str = ""
    said_s: float = 0.0
    began: float = 0.0
    took_s: float = 0.0
    picture: str = ""  # SHA-256


def jobs(count: int, seed: int, tiers: Sequence[str] = TIERS_TRIED) -> list[Job]:
    """Jobs with different bitstreams of 64 to 128 pixels per side."""
    own, photo, rng = zoo.load(2), image.read(PHOTO.read_bytes(), 10**7), random.Random(seed)
    made = []
    for number in range(count):
        height, width = rng.randint(64, 128), rng.randint(64, 128)
        top, left = rng.randint(0, 512 - height), rng.randint(0, 768 - width)
        x = codec.to_tensor(photo[top : top + height, left : left + width].copy())
        data = bitstream.serialize(own.encode(x, "msh", "exact"))
        made.append(Job(data, {"tier": tiers[number % len(tiers)], "seed": number}))
    return made
