"""Sources of requests: objects that are read in place of a body, within the same limits."""

from collections.abc import Callable

import anyio
from fastapi import Request

from models.codec import bitstream
from models.errors import BitstreamError, UnsupportedCodec
from service.auth import Caller
from service.problems import BodyTooLarge, DeadlineExceeded, UnexpectedBody
from service.services import Services
from service.uploads import Reserve
from worker.queue.references import Reference


async def read(
    request: Request | None,
    services: Services,
    caller: Caller,
    text: str,
    reserve: Reserve,
    check: Callable[[bytes, int], object] = lambda *_: None,
) -> bytes:
    """Read an object within the limits of a body; `check` gets its first part and `max_pixels`.

    `request` is the one that names the object, if any; it may have no body. Raises
    `ParameterError`, `UnexpectedBody`, `BodyTooLarge` before or while reading, `DeadlineExceeded`,
    `StoreError`, and what `check` raises.
    """
    reference = Reference.parse(text, "source")
    services.objects.check(reference, caller.name, "read")
    limit, seconds = services.settings.max_bytes, services.settings.body_timeout_s
    too_large = f"{reference} has more than {limit} bytes, which is the limit"
    data = bytearray()
    try:
        with anyio.fail_after(seconds):
            if request is not None:
                await _check_empty(request)
            size, parts = await services.objects.open(reference)
            if size > limit:
                raise BodyTooLarge(too_large)
            async for part in parts:
                if len(data) + len(part) > limit:
                    raise BodyTooLarge(too_large)
                reserve(len(part))
                if not data:
                    check(part, services.settings.max_pixels)
                data += part
    except TimeoutError:
        message = f"only {len(data)} bytes of {reference} were read within {seconds:g} s"
        raise DeadlineExceeded(f"{message}; try again later") from None
    return bytes(data)


async def _check_empty(request: Request) -> None:
    async for part in request.stream():
        if part:
            raise UnexpectedBody("the request has a source and a body; send only one")


def check_header(part: bytes, max_pixels: int) -> None:
    """Refuse a file by its beginning. Raises `UnsupportedCodec`, `PictureTooLarge`."""
    try:
        bitstream.parse(part, max_pixels)
    except UnsupportedCodec:
        raise
    except BitstreamError:
        pass  # the rest of the file is missing
