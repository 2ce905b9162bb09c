"""What routes receive: bodies within limits, and the state that the application keeps."""

import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import Depends, Header, Path, Query, Request
from python_multipart.multipart import parse_options_header
from redis.asyncio import Redis as AsyncRedis
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from models.image import OutputFormat
from models.library import Library
from models.tiers import TIERS
from service import metrics, negotiate
from service.auth import Caller, require
from service.instant import Instant
from service.keys import Scope
from service.negotiate import Preferences
from service.problems import BodyTooLarge, Busy, RequestTimeout
from service.quotas import Quotas
from service.settings import ServiceSettings
from worker.queue.jobs import Jobs
from worker.queue.store import Store
from worker.webhooks.settings import WebhookSettings


class Bodies:
    """The bytes of requests' bodies as they were received, at most `limit`; `FREE` of each do not
    count, so that bitstreams get in beside whatever uploads."""

    FREE = 2**16

    def __init__(self, limit: int) -> None:
        self.held, self.limit = 0, limit

    @contextlib.contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """What counts the parts of one body, until the end; it raises `Busy` at the limit."""
        received = taken = 0

        def take(size: int) -> None:
            nonlocal received, taken
            received += size
            more = max(received - self.FREE, 0) - taken
            if more and self.held + more > self.limit:
                metrics.shed("bodies")
                raise Busy("the requests that are being read take all the memory for them")
            self.held += more
            taken += more

        try:
            yield take
        finally:
            self.held -= taken


@dataclass(frozen=True, slots=True)
class State:
    """Made once, at start-up."""

    settings: ServiceSettings
    library: Library
    decoder_weights: str
    store: Store
    jobs: Jobs
    quotas: Quotas
    webhooks: WebhookSettings
    instant: Instant
    bodies: Bodies
    streams: AsyncRedis  # for reads that wait
    closing: threading.Event = field(default_factory=threading.Event)  # who waits is answered now


async def state(request: Request) -> State:
    """The application's state."""
    own: State = request.app.state.own
    return own


async def body(
    request: Request, own: Annotated[State, Depends(state)]
) -> AsyncGenerator[bytes, None]:
    """The raw body, or the first file of a multipart form, read within the limits.

    Raises `BodyTooLarge`, before reading where Content-Length tells; `RequestTimeout`; `Busy`;
    `MalformedHeader` for a form that is none.
    """
    with own.bodies.one() as take:
        yield await _read(request, own.settings, take)


async def _read(request: Request, settings: ServiceSettings, take: Callable[[int], None]) -> bytes:
    limit, seconds = settings.max_bytes, settings.body_timeout_s
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"{declared} bytes; the limit is {limit}")
    data = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                if len(data) + len(chunk) > limit:
                    raise BodyTooLarge(f"more than {limit} bytes")
                take(len(chunk))
                data += chunk
    except TimeoutError:
        gone = {"Connection": "close"}  # what comes still is no other request
        raise RequestTimeout(f"{len(data)} bytes came within {seconds:g} s", gone) from None
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _first_file(request, bytes(data))
    return bytes(data)


async def _first_file(request: Request, data: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    try:
        _, options = parse_options_header(request.headers["content-type"])
        if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # punycode takes quadratic time
            raise MalformedHeader("a multipart form is read in UTF-8 alone")
        form = await MultiPartParser(request.headers, stream()).parse()
    except (MultiPartException, KeyError, UnicodeError) as e:
        raise MalformedHeader("the multipart form cannot be read") from e
    try:
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise MalformedHeader("the multipart form holds no file")


_COUNTING = anyio.CapacityLimiter(8)
"""Threads that count requests, apart from those that wait for Redis: instant decodes need none."""


def within_quota(scope: Scope, or_link: bool = False) -> Callable[..., Awaitable[Caller]]:
    """A dependency: who asks, as `auth.require`, and once the request is within its quota.

    Raises `Unauthorized`, `Forbidden`, `TooManyRequests`.
    """

    async def caller(
        request: Request,
        own: Annotated[State, Depends(state)],
        who: Annotated[Caller, Depends(require(scope, or_link))],
    ) -> Caller:
        request.state.caller = who.name
        request.state.quota = {}
        if own.quotas.counts(who):
            request.state.quota = await anyio.to_thread.run_sync(
                own.quotas.request, who, limiter=_COUNTING
            )
        return who

    return caller


def _lines(request: Request, name: str) -> str:
    """A header that is a list: several lines are one."""
    return ", ".join(request.headers.getlist(name))


async def accepted(request: Request) -> OutputFormat:
    """The picture's format. Raises `NotAcceptable`."""
    return negotiate.picture_format(_lines(request, "accept"))


def one_of_tiers(description: str) -> Any:
    """A query parameter that names a tier; `tiers.find` says what is wrong with another."""
    return Query(description=description, json_schema_extra={"enum": list(TIERS)})


async def preferred(
    request: Request,
    prefer: Annotated[  # for the schema: it is the first line alone
        str | None, Header(examples=["respond-async, wait=10"], description="RFC 7240.")
    ] = None,
) -> Preferences:
    """What `Prefer` asks for."""
    return negotiate.preferences(_lines(request, "prefer"))


JobId = Annotated[
    str, Path(pattern="^[0-9a-f]{32}$", examples=["3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e"])
]
Own = Annotated[State, Depends(state)]
Body = Annotated[bytes, Depends(body)]
Decoding = Annotated[Caller, Depends(within_quota("decode"))]
Encoding = Annotated[Caller, Depends(within_quota("encode"))]
Viewing = Annotated[Caller, Depends(within_quota("decode", or_link=True))]
"""Decoders, and holders of a link to the picture."""
Accepted = Annotated[OutputFormat, Depends(accepted)]
Preferred = Annotated[Preferences, Depends(preferred)]
