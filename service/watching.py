"""Reads the state of a decode, waits for its end, and follows its events."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from service import schemas
from service.auth import Caller
from service.problems import Conflict, JobNotFound, PictureGone
from service.services import Services
from worker.queue import estimates
from worker.queue import events as job_events
from worker.queue.events import Event
from worker.queue.jobs import POLL_SUBSCRIPTION_S
from worker.queue.records import ENDED, JobState
from worker.queue.store import BLOCK_S


def find(services: Services, id: str, caller: Caller) -> JobState:
    """Return the state of a decode, without a change of subscriptions.

    Raises `JobNotFound` if it does not exist, or if the service is private and the caller has not
    submitted the decode: the two cases look the same.
    """
    hidden = (
        services.settings.private
        and not caller.has_link
        and not services.jobs.has_submitted(id, caller.name)
    )
    state = None if hidden else services.jobs.get(id)
    if state is None:
        raise JobNotFound(f"there is no decode {id}: it was never submitted, or has expired")
    return state


async def load_and_renew(services: Services, id: str, caller: Caller) -> JobState:
    """Return the state of a decode and extend the caller's subscription. Raises `JobNotFound`."""

    def find_and_renew() -> JobState:
        state = find(services, id, caller)
        renew(services, state, caller.name)
        return state

    return await anyio.to_thread.run_sync(find_and_renew)


def renew(services: Services, state: JobState, caller: str) -> None:
    """Extend the caller's subscription to a job that has not ended."""
    if state.status not in ENDED:
        services.jobs.renew(state.id, caller, POLL_SUBSCRIPTION_S)


def check_kept(state: JobState) -> None:
    """Raise `PictureGone` if the finished picture has expired."""
    if state.status == "expired":
        hint = f"POST /v1/decodes/{state.id}/retry to make it again"
        raise PictureGone(f"the picture of decode {state.id} has expired; {hint}")


def view(services: Services, state: JobState, eta_s: float | None = None) -> schemas.Decode:
    """Return the public view of a job; `eta_s` is computed unless it is given."""
    position = services.jobs.position(state)
    if eta_s is None:
        eta_s = estimates.eta_s(services.jobs, state, position)
    return schemas.Decode.of(state, position, eta_s)


async def pending_response(
    services: Services, state: JobState, eta_s: float | None = None
) -> Response:
    """Return 202 with the public view of a job.

    Raises `Conflict` if the job failed or was canceled, so that no picture will come.
    """
    if state.status in {"failed", "canceled"}:
        reason = f" ({state.error})" if state.error else ""
        hint = f"POST /v1/decodes/{state.id}/retry to queue it again"
        raise Conflict(f"decode {state.id} is {state.status}{reason}; {hint}")
    document = await anyio.to_thread.run_sync(view, services, state, eta_s)
    headers = {"Retry-After": str(math.ceil(document.eta_s or 1)), "Cache-Control": "no-store"}
    return JSONResponse(document.model_dump(mode="json"), 202, headers)


async def ended_response(
    services: Services, state: JobState, headers: Mapping[str, str]
) -> Response:
    """Return 200 with the public view of a job that has ended."""
    document = await anyio.to_thread.run_sync(view, services, state)
    fields = {**headers, "Cache-Control": "no-store"}
    return JSONResponse(document.model_dump(mode="json"), 200, fields)


async def wait_until_ended(services: Services, request: Request, id: str, seconds: float) -> None:
    """Return when the job has ended, after `seconds`, or when the server stops.

    If the client disconnects, returns within `BLOCK_S`.
    """
    with anyio.move_on_after(seconds):
        async for _ in events(services, id, "0", None, request.is_disconnected):
            pass


async def _never() -> bool:
    return False


async def events(
    services: Services,
    id: str,
    after: str,
    caller: str | None,
    disconnected: Callable[[], Awaitable[bool]] = _never,
) -> AsyncIterator[Event]:
    """Yield the events of a job that follow event `after`, until the job has ended.

    Also stops when the client is `disconnected` or the server stops. With `caller`, each read
    extends the caller's subscription and asks the worker for previews. If the events have expired,
    the last one is built from the job's record.
    """
    block_ms = None  # the first read returns at once
    while not services.closing.is_set() and not await disconnected():
        if caller is not None:
            await anyio.to_thread.run_sync(_keep_watching, services, id, caller)
        batch = await _read_events(services, id, after, block_ms)
        block_ms = BLOCK_S * 1000
        for event in batch:
            after = event.id
            yield event
        if batch and batch[-1].kind not in job_events.END_OF.values():
            continue
        state = await anyio.to_thread.run_sync(services.jobs.record, id)
        if state is not None and state.status not in ENDED:
            continue
        if state is not None and not batch:
            yield Event.end(state)
        return


def _keep_watching(services: Services, id: str, caller: str) -> None:
    services.jobs.watch(id)
    services.jobs.renew(id, caller, POLL_SUBSCRIPTION_S)


async def _read_events(
    services: Services, id: str, after: str, block_ms: int | None
) -> list[Event]:
    """Return the events after `after`; wait up to `block_ms` for one; with None, do not wait."""
    key = job_events.key(services.store, id)
    streams: list[Any] = await services.streams.xread({key: after}, block=block_ms)  # type: ignore[assignment]
    return [Event.of(entry) for _, entries in streams for entry in entries]
