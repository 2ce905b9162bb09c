"""What routes receive: bodies within limits, and the state that the application keeps."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

import anyio.to_thread
from fastapi import Depends, Header, Request
from redis.asyncio import Redis as AsyncRedis
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from models.image import OutputFormat
from models.library import Library
from service import negotiate
from service.auth import Caller, require
from service.instant import Instant
from service.keys import Scope
from service.negotiate import Preferences
from service.problems import BodyTooLarge
from service.quotas import Quotas
from service.settings import ServiceSettings
from worker.jobs import Jobs
from worker.store import Store
from worker.webhooks import WebhookSettings


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
    streams: AsyncRedis  # for reads that wait


def state(request: Request) -> State:
    """The application's state."""
    own: State = request.app.state.own
    return own


async def body(request: Request, own: Annotated[State, Depends(state)]) -> bytes:
    """The raw body, or the first file of a multipart form, read within the byte limit.

    Raises `BodyTooLarge`, before reading where Content-Length tells; `MalformedHeader` for a form
    that is none.
    """
    limit = own.settings.max_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"{declared} bytes; the limit is {limit}")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise BodyTooLarge(f"more than {limit} bytes")
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _first_file(request, bytes(data))
    return bytes(data)


async def _first_file(request: Request, data: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    try:
        form = await MultiPartParser(request.headers, stream()).parse()
    except (MultiPartException, KeyError) as e:
        raise MalformedHeader("the multipart form cannot be read") from e
    try:
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise MalformedHeader("the multipart form holds no file")


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
        request.state.quota = await anyio.to_thread.run_sync(own.quotas.request, who)
        return who

    return caller


def accepted(
    accept: Annotated[
        str | None, Header(description="PNG, WebP, AVIF, JPEG or NPY, by weight.")
    ] = None,
) -> OutputFormat:
    """The picture's format. Raises `NotAcceptable`."""
    return negotiate.picture_format(accept)


def preferred(
    prefer: Annotated[
        str | None, Header(examples=["respond-async, wait=10"], description="RFC 7240.")
    ] = None,
) -> Preferences:
    """What `Prefer` asks for."""
    return negotiate.preferences(prefer)


Own = Annotated[State, Depends(state)]
Body = Annotated[bytes, Depends(body)]
Decoding = Annotated[Caller, Depends(within_quota("decode"))]
Encoding = Annotated[Caller, Depends(within_quota("encode"))]
Viewing = Annotated[Caller, Depends(within_quota("decode", or_link=True))]
"""Decoders, and holders of a link to the picture."""
Accepted = Annotated[OutputFormat, Depends(accepted)]
Preferred = Annotated[Preferences, Depends(preferred)]
