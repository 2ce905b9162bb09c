"""The state of a decode: get it, follow it as server-sent events, withdraw it, or retry it."""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from models.errors import ParameterError, Quarantined
from service import admission, prefix, problems, schemas, watching
from service.deps import EVENT_STREAM, ONLY_KNOWN, DecodeCaller, JobId, PreferHeader, ServicesDep
from service.problems import (
    Busy,
    Conflict,
    JobNotFound,
    PictureGone,
    QueueFull,
)
from worker.queue.records import ENDED
from worker.queue.store import RedisError

_PROBLEMS = (*problems.OF_AUTHENTICATION, JobNotFound, ParameterError, problems.QueueAway)
router = APIRouter(prefix="/v1/decodes", tags=["decodes"], dependencies=[ONLY_KNOWN])

RECONNECT_MS = 2000
"""How long a client waits before it reconnects a broken event stream."""
_EVENT = """event: progress
id: 1767268801000-0
data: {"step": 2, "total": 10, "id": "3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e"}

"""
_EVENT_ID = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


@router.get(
    "/{id}",
    summary="Get the state of a decode",
    responses=problems.responses(*_PROBLEMS, PictureGone),
)
async def status(
    services: ServicesDep,
    caller: DecodeCaller,
    id: JobId,
    prefer: PreferHeader,
    request: Request,
    response: Response,
) -> schemas.Decode:
    """Status, finished steps and position in the queue. With `Prefer: wait=N`, responds when the
    decode has ended or after N seconds."""
    state = await watching.load_and_renew(services, id, caller, seen=True)
    watching.check_kept(state)
    if prefer.wait_s:
        await watching.wait_until_ended(services, request, id, prefer.wait_s, caller.name)
        state = await anyio.to_thread.run_sync(watching.find_seen, services, id, caller)
        response.headers["Preference-Applied"] = f"wait={prefer.wait_s}"
    response.headers["Cache-Control"] = "no-store"
    return await anyio.to_thread.run_sync(watching.view, services, state, caller.name)


async def _check_kept(services: ServicesDep, caller: DecodeCaller, id: JobId) -> None:
    """Raise `JobNotFound` or `PictureGone` before the event stream begins."""
    watching.check_kept(await watching.load_and_renew(services, id, caller, seen=True))


@router.get(
    "/{id}/events",
    summary="Follow a decode",
    response_class=EventSourceResponse,
    dependencies=[EVENT_STREAM, Depends(_check_kept)],
    responses={
        200: {
            "content": {"text/event-stream": {"example": _EVENT}},
            "description": "Events, until the decode has ended.",
        },
        **problems.responses(*_PROBLEMS, PictureGone),
    },
)
async def follow(
    services: ServicesDep,
    caller: DecodeCaller,
    id: JobId,
    last_event_id: Annotated[
        str | None,
        Header(description="Id of the last event received; the stream continues after it."),
    ] = None,
    last_event_id_in_query: Annotated[
        str | None,
        Query(
            alias="lastEventId",
            description="The same, from polyfills of EventSource, which cannot send headers.",
        ),
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the decode ends: `queued`, `started`, `progress`, `preview`,
    `completed`, `failed`, `canceled`."""
    last = last_event_id or last_event_id_in_query
    after = last if last and _is_event_id(last) else "0"
    yield ServerSentEvent(comment="connected", retry=RECONNECT_MS)
    with contextlib.suppress(RedisError):  # ends the stream; the client reconnects and gets a 503
        async for event in watching.events(services, id, after, caller.name):
            data = event.data | {"id": id}
            if event.kind == "preview":
                path = f"/v1/decodes/{id}/preview?step={event.data['step']}"
                data["image"] = prefix.public(path)
            yield ServerSentEvent(data=data, event=event.kind, id=event.id)


@router.delete(
    "/{id}",
    summary="Withdraw a request",
    responses={
        200: {
            "model": schemas.Decode,
            "description": "Withdrawn. The decode is canceled unless other callers wait for it.",
        },
        202: {
            "model": schemas.Decode,
            "description": "Withdrawn. The decode is running; its worker will cancel it.",
        },
        **problems.responses(*_PROBLEMS, Conflict),
    },
)
async def withdraw(services: ServicesDep, caller: DecodeCaller, id: JobId) -> Response:
    """End the caller's subscription to the decode. The job is canceled if no other caller waits
    for it."""

    def unsubscribe() -> tuple[schemas.Decode, bool]:
        state = watching.find_seen(services, id, caller)
        if state.status in ENDED:
            raise Conflict(f"decode {id} has already ended: {state.status}")
        has_subscribers = services.jobs.withdraw(id, caller.name)
        services.quotas.release_job(caller, id)
        document = watching.view(services, watching.find(services, id, caller), caller.name)
        return document, document.status == "running" and not has_subscribers

    document, stopping = await anyio.to_thread.run_sync(unsubscribe)
    return JSONResponse(document.model_dump(mode="json"), 202 if stopping else 200)


@router.post(
    "/{id}/retry",
    status_code=202,
    summary="Retry a decode",
    responses=problems.responses(*_PROBLEMS, Conflict, Quarantined, Busy, QueueFull),
)
async def retry(
    services: ServicesDep, caller: DecodeCaller, id: JobId, response: Response
) -> schemas.Decode:
    """Queue a decode again if it failed, was canceled, or its picture has expired."""

    def requeue() -> schemas.Decode:
        state, seen = (f(services, id, caller) for f in (watching.find, watching.find_seen))
        if {state.status, seen.status}.isdisjoint({"failed", "canceled", "expired"}):
            reason = "only a failed, canceled or expired decode can be retried"
            raise Conflict(f"decode {id} has the status '{seen.status}'; {reason}")
        services.jobs.targets.retry(id, caller.name)
        if state.status == "succeeded":  # only the caller's targets have failed
            return watching.view(services, state, caller.name)
        data = services.store.bitstream(state.decode.digest)
        if data is None:
            raise JobNotFound(
                f"the bitstream of decode {id} has expired; submit the bitstream again"
            )
        admission.admit(services, state, caller.name, caller.priority)
        services.quotas.job(caller, id)
        state, _ = services.jobs.submit(
            state.decode, data, caller.name, priority=caller.priority, weight=caller.weight
        )
        return watching.view(services, state, caller.name)

    response.headers["Location"] = prefix.public(f"/v1/decodes/{id}")
    return await anyio.to_thread.run_sync(requeue)


def _is_event_id(event_id: str) -> bool:
    """Whether the text is a Redis stream id: two 64-bit numbers."""
    parts = _EVENT_ID.fullmatch(event_id)
    return parts is not None and all(int(n) < 2**64 for n in parts.groups())
