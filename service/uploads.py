"""Reads request bodies within limits of size, time and memory; takes the file out of forms."""

import contextlib
from collections.abc import Callable, Iterator

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData, UploadFile

from models.errors import MalformedHeader
from service import forms, metrics, parameters
from service.problems import BodyTooLarge, Busy, RequestTimeout, UnsupportedEncoding
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
    """Return the request's body or, for a multipart form, the file in it.

    Calls `reserve` with the size of each chunk. Raises `UnsupportedEncoding` and, if Content-Length
    exceeds the limit, `BodyTooLarge` before reading; `BodyTooLarge`; `RequestTimeout`; for a form,
    `MalformedHeader` if it is invalid, `RequestValidationError` if it holds fields or a second
    file.
    """
    data = await _read_raw(request, settings, reserve)
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        form = await forms.parse(content_type, data)
        try:
            return await _only_file(request, form)
        finally:
            await form.close()
    return data


async def _read_raw(
    request: Request, settings: ServiceSettings, reserve: Callable[[int], None]
) -> bytes:
    _check_encoding(request)
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


def _check_encoding(request: Request) -> None:
    """Raise `UnsupportedEncoding` for a compressed body."""
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    if {name.strip().lower() for name in encoding.split(",")} - {"identity", ""}:
        message = "send the file itself, uncompressed and without this header"
        raise UnsupportedEncoding(
            f"Content-Encoding is {encoding[: parameters.MAX_QUOTED]!r}; {message}",
            {"Accept-Encoding": "identity"},
        )


async def _only_file(request: Request, form: FormData) -> bytes:
    """Return the form's file. Empty ones, which are inputs left blank, do not count beside others.

    Raises `MalformedHeader` without a file, `RequestValidationError` for a form that holds more:
    nothing that is sent is ignored.
    """
    items = form.multi_items()
    files = [(name, value) for name, value in items if isinstance(value, UploadFile)]
    if not files:
        hint = "send one, for example with curl -F file=@NAME"
        raise MalformedHeader(f"the multipart form contains no file; {hint}")
    fields = {name: value for name, value in items if isinstance(value, str)}
    if fields:
        raise parameters.misplaced(request, fields)
    filled = [(name, file) for name, file in files if file.size]
    if len(filled) > 1:
        message = f"the form holds {len(filled)} files; send one in each request"
        raise RequestValidationError([parameters.fault("form", filled[1][0], message)])
    _, file = (filled or files)[0]
    return await file.read()
