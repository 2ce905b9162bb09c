"""Reads request bodies within limits of size, time and memory; takes the file out of forms."""

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator

import anyio
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from service import metrics
from service.problems import BodyTooLarge, Busy, RequestTimeout
from service.settings import ServiceSettings


class UploadBudget:
    """Memory budget of `limit` bytes for the bodies of all requests that are being processed.

    The first `FREE` bytes of each body do not count: bitstreams are accepted even while large
    uploads use up the budget.
    """

    FREE = 2**16

    def __init__(self, limit: int) -> None:
        self.used, self.limit = 0, limit

    @contextlib.contextmanager
    def upload(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes for one body; release all of them on exit.

        The function raises `Busy` if the budget is used up.
        """
        received = reserved = 0

        def reserve(size: int) -> None:
            nonlocal received, reserved
            received += size
            more = max(received - self.FREE, 0) - reserved
            if more and self.used + more > self.limit:
                metrics.shed("bodies")
                message = f"other uploads use up the {self.limit} bytes for request bodies"
                raise Busy(f"{message}; try again later")
            self.used += more
            reserved += more

        try:
            yield reserve
        finally:
            self.used -= reserved


async def read(
    request: Request, settings: ServiceSettings, reserve: Callable[[int], None]
) -> bytes:
    """Return the request's body or, for a multipart form, the first file in it.

    Calls `reserve` with the size of each chunk. Raises `BodyTooLarge`, before reading if
    Content-Length exceeds the limit; `RequestTimeout`; `MalformedHeader` for an invalid form.
    """
    data = await _read_raw(request, settings, reserve)
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _first_file(request, data)
    return data


async def _read_raw(
    request: Request, settings: ServiceSettings, reserve: Callable[[int], None]
) -> bytes:
    limit, seconds = settings.max_bytes, settings.body_timeout_s
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; the limit is {limit}")
    data = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                if len(data) + len(chunk) > limit:
                    raise BodyTooLarge(f"the body has more than {limit} bytes, which is the limit")
                reserve(len(chunk))
                data += chunk
    except TimeoutError:
        close = {"Connection": "close"}  # the rest of the body must not be read as a new request
        message = f"only {len(data)} bytes of the body arrived within {seconds:g} s; send it again"
        raise RequestTimeout(message, close) from None
    return bytes(data)


async def _first_file(request: Request, data: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    try:
        _, options = parse_options_header(request.headers["content-type"])
        charset = options.get(b"charset", b"utf-8").lower()
        if charset != b"utf-8":  # other codecs may be slow: punycode takes quadratic time
            name = charset.decode("latin-1")
            raise MalformedHeader(f"the charset of the multipart form is {name!r}; use UTF-8")
        form = await MultiPartParser(request.headers, stream()).parse()
    except (MultiPartException, KeyError, UnicodeError) as e:
        message = "the multipart form cannot be parsed; check it, or send the file as the body"
        raise MalformedHeader(message) from e
    try:
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise MalformedHeader("the multipart form contains no file; add a part with a filename")
