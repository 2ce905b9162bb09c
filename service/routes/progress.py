"""Where a decode stands: asked, waited for, followed as events; withdrawn or tried again."""

import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from models.errors import ParameterError, Quarantined
from service import admission, problems, schemas
from service.deps import Decoding, JobId, Own, Preferred, State
from service.problems import Busy, Conflict, JobNotFound, PictureGone, QueueFull
from worker.queue import estimates, events
from worker.queue.events import Event
from worker.queue.jobs import POLL_SUBSCRIPTION_S
from worker.queue.records import ENDED, JobState
from worker.queue.store import BLOCK_S, RedisError

_ASKED = (*problems.OF_KEYS, JobNotFound, ParameterError, problems.QueueAway)
router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

RECONNECT_MS = 2000
"""When a client that lost its event stream should come back."""
_EVENT = """event: progress
id: 1767268801000-0
data: {"step": 2, "total": 4, "id": "3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e"}

"""
_EVENT_ID = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


@router.get(
    "/{id}",
    summary="Where a decode stands",
    responses=problems.responses(*_ASKED, PictureGone),
)
async def status(
    own: Own, caller: Decoding, id: JobId, prefer: Preferred, request: Request, response: Response
) -> schemas.Decode:
    """Status, steps done, place in the queue; with `Prefer: wait=N`, once it has ended or after N
    seconds."""
    await _kept(own, id, caller.name)
    if prefer.wait_s:
        await until_ended(own, request, id, prefer.wait_s)
        response.headers["Preference-Applied"] = f"wait={prefer.wait_s}"
    response.headers["Cache-Control"] = "no-store"
    return await anyio.to_thread.run_sync(view, own, id)


async def _followed(own: Own, caller: Decoding, id: JobId) -> JobState:
    """Raised before the stream begins: what is wrong with the id."""
    return await _kept(own, id, caller.name)


@router.get(
    "/{id}/events",
    summary="Follow a decode",
    response_class=EventSourceResponse,
    responses={
        200: {
            "content": {"text/event-stream": {"example": _EVENT}},
            "description": "Events, until the decode has ended.",
        },
        **problems.responses(*_ASKED, PictureGone),
    },
)
async def follow(
    own: Own,
    caller: Decoding,
    id: JobId,
    state: Annotated[JobState, Depends(_followed)],
    last_event_id: Annotated[
        str | None, Header(description="Of the last event that was read: the next comes first.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the end: `queued started progress preview completed failed
    canceled`."""
    after = last_event_id if _known(last_event_id or "") else "0"
    yield ServerSentEvent(comment="connected", retry=RECONNECT_MS)
    with contextlib.suppress(RedisError):  # the stream ends; who comes back is told why
        async for event in _events(own, id, str(after), caller.name):
            data = event.data | {"id": id}
            if event.kind == "preview":
                data["image"] = f"/v1/decodes/{id}/preview?step={event.data['step']}"
            yield ServerSentEvent(data=data, event=event.kind, id=event.id)


@router.delete(
    "/{id}",
    summary="Withdraw",
    responses={
        200: {"model": schemas.Decode, "description": "Withdrawn; where nobody else waits, over."},
        202: {"model": schemas.Decode, "description": "A worker is drawing it, and will stop."},
        **problems.responses(*_ASKED, Conflict),
    },
)
async def withdraw(own: Own, caller: Decoding, id: JobId) -> Response:
    """The caller no longer wants the picture; where nobody else does, the job ends."""

    def stop() -> tuple[schemas.Decode, bool]:
        state = _find(own, id)
        if state.status in ENDED:
            raise Conflict(f"decode {id} is {state.status} already")
        wanted = own.jobs.withdraw(id, caller.name)
        own.quotas.ended(caller, id)
        shown = view(own, id)
        return shown, shown.status == "running" and not wanted

    shown, stopping = await anyio.to_thread.run_sync(stop)
    return JSONResponse(shown.model_dump(mode="json"), 202 if stopping else 200)


@router.post(
    "/{id}/retry",
    status_code=202,
    summary="Try again",
    responses=problems.responses(*_ASKED, Conflict, Quarantined, Busy, QueueFull),
)
async def retry(own: Own, caller: Decoding, id: JobId, response: Response) -> schemas.Decode:
    """Queue a decode again that failed, was canceled, or whose picture is no longer kept."""

    def again() -> schemas.Decode:
        state = _find(own, id)
        if state.status not in {"failed", "canceled", "expired"}:
            raise Conflict(f"decode {id} is {state.status}")
        data = own.store.bitstream(state.decode.digest)
        if data is None:
            raise JobNotFound(f"the bitstream of decode {id} is no longer kept; send it again")
        admission.admit(own, id)
        own.quotas.job(caller, id)
        own.jobs.submit(state.decode, data, caller.name)
        return view(own, id)

    response.headers["Location"] = f"/v1/decodes/{id}"
    return await anyio.to_thread.run_sync(again)


def _known(event_id: str) -> bool:
    """Whether it can be an event's: two numbers of 64 bits."""
    parts = _EVENT_ID.fullmatch(event_id)
    return parts is not None and all(int(n) < 2**64 for n in parts.groups())


async def look(own: State, id: str, caller: str) -> JobState:
    """A decode's state; to ask is to be interested. Raises `JobNotFound`."""

    def ask() -> JobState:
        state = _find(own, id)
        if state.status not in ENDED:
            own.jobs.renew(id, caller, POLL_SUBSCRIPTION_S)
        return state

    return await anyio.to_thread.run_sync(ask)


async def until_ended(own: State, request: Request, id: str, seconds: float) -> None:
    """Return when the job has ended, or so many seconds later, or when the service stops; within
    `BLOCK_S` when who asks has gone."""
    with anyio.move_on_after(seconds):
        async for _ in _events(own, id, "0", None, request.is_disconnected):
            pass


def view(own: State, id: str) -> schemas.Decode:
    """The public view of a job. Raises `JobNotFound`."""
    state = _find(own, id)
    position = own.jobs.position(state)
    return schemas.Decode.of(state, position, estimates.eta_s(own.jobs, state, position))


async def _here() -> bool:
    return False


async def _events(
    own: State,
    id: str,
    after: str,
    caller: str | None,
    gone: Callable[[], Awaitable[bool]] = _here,
) -> AsyncIterator[Event]:
    """What happens to a job after an event, until it has ended, who reads has `gone`, or the
    service stops; `caller`, if any, watches it.

    The end is told by the record where the events themselves are no longer kept.
    """
    name, block_ms = events.key(own.store, id), None  # at first what is there
    while not own.closing.is_set() and not await gone():
        if caller is not None:
            await anyio.to_thread.run_sync(own.jobs.watch, id)
            await anyio.to_thread.run_sync(own.jobs.renew, id, caller, POLL_SUBSCRIPTION_S)
        found: list[Any] = await own.streams.xread({name: after}, block=block_ms)  # type: ignore[assignment]
        block_ms = BLOCK_S * 1000
        told = [Event.of(entry) for _, entries in found for entry in entries]
        for event in told:
            after = event.id
            yield event
        if told and told[-1].kind not in events.END_OF.values():
            continue
        state = await anyio.to_thread.run_sync(own.jobs.record, id)
        if state is None or state.status in ENDED:
            if state is not None and not told:
                yield Event.end(state)
            return


async def _kept(own: State, id: str, caller: str) -> JobState:
    state = await look(own, id, caller)
    if state.status == "expired":
        raise PictureGone(f"the picture of decode {id} is no longer kept; retry makes it again")
    return state


def _find(own: State, id: str) -> JobState:
    state = own.jobs.get(id)
    if state is None:
        raise JobNotFound(f"there is no decode {id}")
    return state
