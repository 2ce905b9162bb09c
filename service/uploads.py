"""Reads request bodies within limits of size, time and memory; takes the file out of forms."""

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator

import anyio
import anyio.lowlevel
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from service import metrics, parameters
from service.negotiate import MAX_ITEMS, MAX_LENGTH
from service.problems import BodyTooLarge, Busy, RequestTimeout
from service.settings import ServiceSettings

MAX_PARTS = 16
"""Files that a multipart form may hold, and fields. One file is read."""
PIECE = 2**16
"""Bytes of a form that are parsed at a time, which takes at most some milliseconds."""


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

    Calls `reserve` with the size of each chunk. Raises `BodyTooLarge`, before reading if
    Content-Length exceeds the limit; `RequestTimeout`; for a form, `MalformedHeader` if it is
    invalid, `RequestValidationError` if it holds fields or a second file.
    """
    data = await _read_raw(request, settings, reserve)
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        form = await _parse_form(content_type, data)
        try:
            return await _only_file(request, form)
        finally:
            await form.close()
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


async def _parse_form(content_type: str, data: bytes) -> FormData:
    """Parse a multipart form, in pieces between which other requests run.

    Raises `MalformedHeader`, also for more than `MAX_PARTS` files or fields.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        for at in range(0, len(data), PIECE):
            yield data[at : at + PIECE]
            await anyio.lowlevel.checkpoint()

    try:
        headers, boundary = _form_headers(content_type)
        if b"--" + boundary + b"--" not in data:
            raise MalformedHeader("the multipart form is cut off: its last boundary is missing")
        parser = MultiPartParser(headers, stream(), max_files=MAX_PARTS, max_fields=MAX_PARTS)
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError) as e:
        raise MalformedHeader("the multipart form cannot be parsed") from e


def _form_headers(content_type: str) -> tuple[Headers, bytes]:
    """The header that the parser reads, without other parameters, and the boundary in it.

    RFC 7578 defines no charset for forms: it would only concern names of fields, and decoding some
    charsets, such as punycode, takes quadratic time. Raises `MalformedHeader`, `KeyError` without a
    boundary.
    """
    if len(content_type) > MAX_LENGTH or content_type.count(";") > MAX_ITEMS:
        limits = f"at most {MAX_LENGTH} characters and {MAX_ITEMS} parameters are read"
        raise MalformedHeader(f"Content-Type has {len(content_type)} characters; {limits}")
    _, options = parse_options_header(content_type)
    boundary = options[b"boundary"]
    quoted = boundary.decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
    return Headers({"Content-Type": f'multipart/form-data; boundary="{quoted}"'}), boundary


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
