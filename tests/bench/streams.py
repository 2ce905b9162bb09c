"""Different bitstreams of one photograph, because the service decodes equal ones only once."""

import functools

from models import image
from models.codec import bitstream, codec, zoo
from tests.support.data import PHOTO

QUALITY = 2
SHIFT = 12
"""Columns by which each picture is shifted further than the one before."""


@functools.cache
def shifted(count: int, format: bitstream.Format) -> tuple[bytes, ...]:
    """Encode `count` (at most 64) different pictures of 768×512: the photograph, shifted."""
    q2 = zoo.load(QUALITY)
    photo = codec.to_tensor(image.read(PHOTO.read_bytes(), 10**6))
    pictures = (photo.roll(SHIFT * number, 3) for number in range(count))
    return tuple(bitstream.serialize(q2.encode(x, format, "exact")) for x in pictures)
