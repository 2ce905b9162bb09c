"""`/v1/batches`: decode many bitstreams from object stores to object stores."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from models.errors import ParameterError
from service import prefix, problems
from service.batches import request_schemas, requests, views
from service.batches.schemas import Batch, BatchPage
from service.deps import EVENT_STREAM, ONLY_KNOWN, DecodeCaller, RequestBody, ServicesDep
from service.problems import BatchNotFound, Conflict, KeyReused, QueueFull
from worker.queue.batches.store import Batches
from worker.queue.store import RedisError

_PROBLEMS = (*problems.OF_AUTHENTICATION, BatchNotFound, ParameterError, problems.QueueAway)
router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[ONLY_KNOWN])

BatchId = Annotated[
    str, Path(pattern="^[0-9a-f]{32}$", examples=["7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f"])
]
RECONNECT_MS = 2000
"""How long a client waits before it reconnects a broken event stream."""
_EVENT = """event: progress
id: 1767268801000-0
data: {"id": "7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f", "total": 1200, "waiting": 1000, "queued": 60}

"""
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/BatchRequest"},
                "examples": {
                    "prefixes": {"value": request_schemas.REQUEST},
                    "items": {"value": request_schemas.REQUEST_OF_ITEMS},
                },
            }
        },
    }
}


@router.post(
    "",
    status_code=202,
    summary="Submit a batch",
    openapi_extra=_BODY,
    responses={
        202: {"description": "The batch is accepted; `Location` is its URL."},
        **problems.responses(
            *_PROBLEMS, *problems.OF_BODIES, *problems.OF_STORES, KeyReused, QueueFull
        ),
    },
)
async def submit_batch(
    services: ServicesDep,
    caller: DecodeCaller,
    data: RequestBody,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Any key for this request. A repeated request with the same key adds no "
            "second batch.",
        ),
    ] = None,
) -> Batch:
    """Decode many bitstreams from object stores to object stores: the `items`, or all objects below
    the prefix `source`.

    The items become decodes, a bounded number at a time. Rights to stores and the caller's quotas
    are checked now, and again when an item begins. A picture that exists already costs nothing.
    """
    id = await requests.submit(services, caller, data, idempotency_key)
    response.headers["Location"] = prefix.public(f"/v1/batches/{id}")
    return await anyio.to_thread.run_sync(views.view, services, id, caller)


@router.get("", summary="List batches", responses=problems.responses(*_PROBLEMS))
async def list_batches(
    services: ServicesDep,
    caller: DecodeCaller,
    response: Response,
    after: Annotated[
        str,
        Query(
            pattern="^([0-9a-f]{32})?$", description="List batches that are older than this one."
        ),
    ] = "",
    limit: Annotated[int, Query(ge=1, le=100, description="Batches to list, at most.")] = 20,
) -> BatchPage:
    """The caller's batches, newest first, in pages. Without API keys, all batches."""
    response.headers["Cache-Control"] = "no-store"
    return await anyio.to_thread.run_sync(views.newest, services, caller, after, limit)


@router.get("/{id}", summary="Get the state of a batch", responses=problems.responses(*_PROBLEMS))
async def batch_status(
    services: ServicesDep,
    caller: DecodeCaller,
    id: BatchId,
    response: Response,
    after: Annotated[
        int, Query(ge=-1, description="List failed items whose number is larger.")
    ] = -1,
    limit: Annotated[int, Query(ge=0, le=1000, description="Failed items to list, at most.")] = 100,
) -> Batch:
    """Counts by status, pictures per minute, the time that is left, and the failed items with their
    problems, in pages."""
    response.headers["Cache-Control"] = "no-store"
    return await anyio.to_thread.run_sync(views.view, services, id, caller, after, limit)


async def _check_exists(services: ServicesDep, caller: DecodeCaller, id: BatchId) -> None:
    """Raise `BatchNotFound` before the event stream begins."""
    await anyio.to_thread.run_sync(views.find, services, id, caller)


@router.get(
    "/{id}/events",
    summary="Follow a batch",
    response_class=EventSourceResponse,
    dependencies=[EVENT_STREAM, Depends(_check_exists)],
    responses={
        200: {
            "content": {"text/event-stream": {"example": _EVENT}},
            "description": "Events, until the batch has ended.",
        },
        **problems.responses(*_PROBLEMS),
    },
)
async def follow_batch(
    services: ServicesDep, caller: DecodeCaller, id: BatchId
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the batch ends: `progress` with the counts by status, at most one in
    a second; at the end `ended`."""
    yield ServerSentEvent(comment="connected", retry=RECONNECT_MS)
    with contextlib.suppress(RedisError):  # ends the stream; the client reconnects and gets a 503
        async for kind, event_id, data in views.events(services, id):
            yield ServerSentEvent(data=data, event=kind, id=event_id)


@router.delete(
    "/{id}",
    status_code=202,
    summary="Cancel a batch",
    responses=problems.responses(*_PROBLEMS, Conflict),
)
async def cancel_batch(services: ServicesDep, caller: DecodeCaller, id: BatchId) -> Batch:
    """Cancel all items that have not begun. The others go on, and the batch then ends."""

    def cancel() -> Batch:
        views.find(services, id, caller)
        if not Batches(services.store).cancel(id):
            raise Conflict(f"batch {id} has already ended")
        return views.view(services, id, caller)

    return await anyio.to_thread.run_sync(cancel)


@router.post(
    "/{id}/retry",
    status_code=202,
    summary="Retry the failed items of a batch",
    responses=problems.responses(*_PROBLEMS, Conflict, QueueFull),
)
async def retry_batch(
    services: ServicesDep, caller: DecodeCaller, id: BatchId, response: Response
) -> Batch:
    """Take the failed items again. A listing that has failed goes on."""

    def retry() -> Batch:
        batch = views.find(services, id, caller)
        if not Batches(services.store).retry(batch):
            raise Conflict(f"no item of batch {id} has failed; there is nothing to retry")
        return views.view(services, id, caller)

    response.headers["Location"] = prefix.public(f"/v1/batches/{id}")
    return await anyio.to_thread.run_sync(retry)
