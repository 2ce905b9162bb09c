"""Pictures of a diffusion decode: the finished picture, and the draft shown until it is ready."""

import contextlib

import anyio
import anyio.to_thread

from models import cancellation, geometry, image
from models.codec import bitstream
from models.codec.bitstream import Bitstream
from models.errors import WrongWeights
from models.image import OutputFormat
from models.library import provenance
from service import instant
from service.instant import PictureFile
from service.lines import USUAL
from service.problems import JobNotFound
from service.services import Services
from service.waiter import Waiter
from worker.queue.records import DecodeRequest
from worker.queue.store import RedisError

_READERS = anyio.CapacityLimiter(8)
"""Threads that find the model of a bitstream, for which they may load weights; separate, so that a
slow Redis does not block instant decodes."""


async def finished_picture(
    services: Services,
    decode: DecodeRequest,
    format: OutputFormat,
    waiter: Waiter,
    alpha: float = 1.0,
) -> bytes | None:
    """Return the finished picture as a file at realism `alpha`, or None if it is not in the cache.

    If `alpha` is below 1, raises `JobNotFound` if the bitstream has expired, and `WrongWeights` if
    its codec is not installed any more.
    """
    png = await anyio.to_thread.run_sync(services.store.picture, decode.id)
    if png is None or (format == "png" and alpha == 1):
        return png
    b = None if alpha == 1 else await stored_bitstream(services, decode)

    def convert() -> PictureFile:
        pixels = image.read(png, services.settings.max_pixels)
        if b is not None:
            pixels = services.library.at_realism(b, pixels, alpha)
        cancellation.check()
        metadata = provenance(
            decode.tier, decode.settings, decode.seed, decode.codec, decode.decoder, alpha
        )
        return PictureFile(image.write(pixels, format, metadata))

    megapixels = geometry.megapixels(decode.height, decode.width)
    key = decode.id, format, alpha
    kind = USUAL if b is None else instant.kind(b)
    return (await services.instant.once(key, convert, megapixels, waiter, kind)).data


async def draft(
    services: Services, decode: DecodeRequest, b: Bitstream, format: OutputFormat, waiter: Waiter
) -> PictureFile:
    """Return the instant picture, from the Redis cache if it is there.

    Without Redis the picture is computed and not stored.
    """
    key = decode.digest, decode.codec, format
    with contextlib.suppress(RedisError):
        cached = await anyio.to_thread.run_sync(services.store.draft, *key)
        if cached is not None:
            return PictureFile(cached)
    picture = await services.instant.picture(b, decode.digest, format, waiter)
    with contextlib.suppress(RedisError):
        await anyio.to_thread.run_sync(services.store.put_draft, *key, picture.data)
    return picture


async def read_bitstream(services: Services, data: bytes) -> Bitstream:
    """Parse a bitstream, as a file of the model whose weights decode it.

    Raises `BitstreamError`, `PictureTooLarge`, or `WeightsError` as `Library.find`.
    """
    b = bitstream.parse(data, services.settings.max_pixels)
    if not b.others:
        return b
    return await anyio.to_thread.run_sync(services.library.read, b, limiter=_READERS)


async def stored_bitstream(services: Services, decode: DecodeRequest) -> Bitstream:
    """Return the submitted bitstream of a decode.

    Raises `JobNotFound` if it has expired, `WrongWeights` if its codec is no longer installed.
    """
    data = await anyio.to_thread.run_sync(services.store.bitstream, decode.digest)
    if data is None:
        raise JobNotFound(
            f"the bitstream of decode {decode.id} has expired; submit the bitstream again"
        )
    b = await read_bitstream(services, data)
    if services.library.codec_id(b) != decode.codec:
        raise WrongWeights(
            f"decode {decode.id} needs the weights {decode.codec}, which are not in use any more; "
            "submit the bitstream again"
        )
    return b
