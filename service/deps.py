"""What routes receive: bodies within limits, and the state that the application keeps."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated

import anyio
from fastapi import Depends, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from models.library import Library
from service.problems import BodyTooLarge
from service.settings import ServiceSettings
from worker.jobs import Jobs
from worker.store import Store


@dataclass(frozen=True, slots=True)
class State:
    """Made once, at start-up."""

    settings: ServiceSettings
    library: Library
    decoder_weights: str
    store: Store
    jobs: Jobs
    cores: anyio.CapacityLimiter  # how many pictures are computed at once


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


Own = Annotated[State, Depends(state)]
Body = Annotated[bytes, Depends(body)]
