"""Reads the state of a decode, waits for its end, and follows its events."""

import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from redis.client import Pipeline

from service import schemas
from service.auth import Caller
from service.problems import Conflict, JobNotFound, PictureGone
from service.services import Services
from service.waiter import Waiter
from worker.queue import estimates, submitters, targets
from worker.queue import events as job_events
from worker.queue.estimates import Outlook
from worker.queue.events import Event
from worker.queue.jobs import POLL_SUBSCRIPTION_S
from worker.queue.records import ENDED, JobState
from worker.queue.targets import Target

_THREADS = anyio.CapacityLimiter(16)
"""Threads that read states for clients that poll or begin to follow. More would compete with the
event loop for the interpreter's lock."""
OVER_LIMIT_S = 1.0
"""How long a request waits that exceeds its caller's `waits_at_once`. It follows nothing."""


def find(services: Services, id: str, caller: Caller) -> JobState:
    """Return the state of a decode without extending the caller's subscription.

    Raises `JobNotFound` if it does not exist or if, in a private service, the caller has not
    submitted it: the caller cannot tell the two cases apart.
    """
    hidden = (
        services.settings.private
        and not caller.has_link
        and not submitters.contains(services.store, id, caller.name)
    )
    state = None if hidden else services.jobs.get(id)
    if state is None:
        raise JobNotFound(f"there is no decode {id}: it was never submitted, or has expired")
    return state


def find_seen(services: Services, id: str, caller: Caller) -> JobState:
    """As `find`, but the decode has not succeeded for the caller until its targets are written."""
    return _seen(services, find(services, id, caller), caller.name)[0]


def _seen(services: Services, state: JobState, caller: str) -> tuple[JobState, list[Target]]:
    """The state of a decode as the caller sees it, and the caller's targets."""
    if not services.objects.configs:
        return state, []
    owned = services.jobs.targets.of(state.id, caller)
    return targets.seen_by_caller(state, owned), owned


async def load_and_renew(
    services: Services, id: str, caller: Caller, seen: bool = False
) -> JobState:
    """Return the state of a decode and extend the caller's subscription. Raises `JobNotFound`.

    `seen`: as `find_seen` returns it.
    """

    def find_and_renew() -> JobState:
        state = find(services, id, caller)
        renew(services, state, caller.name)
        return _seen(services, state, caller.name)[0] if seen else state

    return await anyio.to_thread.run_sync(find_and_renew, limiter=_THREADS)


def renew(services: Services, state: JobState, caller: str) -> None:
    """Extend the caller's subscription to a job that has not ended."""
    if state.status not in ENDED:
        services.jobs.renew(state.id, caller, POLL_SUBSCRIPTION_S)


def check_kept(state: JobState) -> None:
    """Raise `PictureGone` if the finished picture has expired."""
    if state.status == "expired":
        hint = f"POST /v1/decodes/{state.id}/retry to make it again"
        raise PictureGone(f"the picture of decode {state.id} has expired; {hint}")


def view(
    services: Services, state: JobState, caller: str, outlook: Outlook | None = None
) -> schemas.Decode:
    """Return the caller's view of a job; its outlook is computed unless it is given."""
    state, owned = _seen(services, state, caller)
    if state.status in ENDED:
        return schemas.Decode.of(state, None, None, owned)
    outlook = outlook or estimates.outlook_of(services.jobs, state)
    return schemas.Decode.of(state, outlook.position, outlook.eta_s(state), owned)


async def pending_response(
    services: Services, state: JobState, caller: Caller, outlook: Outlook | None = None
) -> Response:
    """Return 202 with the caller's view of a job.

    Raises `Conflict` if the job failed or was canceled, so that no picture will come.
    """
    if state.status in {"failed", "canceled"}:
        reason = f" ({state.error})" if state.error else ""
        hint = f"POST /v1/decodes/{state.id}/retry to queue it again"
        raise Conflict(f"decode {state.id} has the status '{state.status}'{reason}; {hint}")
    document = await anyio.to_thread.run_sync(view, services, state, caller.name, outlook)
    headers = {"Retry-After": str(math.ceil(document.eta_s or 1)), "Cache-Control": "no-store"}
    return JSONResponse(document.model_dump(mode="json"), 202, headers)


async def ended_response(
    services: Services, state: JobState, caller: Caller, headers: Mapping[str, str]
) -> Response:
    """Return 200 with the caller's view of a job that has ended."""
    document = await anyio.to_thread.run_sync(view, services, state, caller.name)
    fields = {**headers, "Cache-Control": "no-store"}
    return JSONResponse(document.model_dump(mode="json"), 200, fields)


async def wait_until_ended(
    services: Services, request: Request, id: str, seconds: float, caller: str | None
) -> None:
    """Return when the job has ended, after `seconds`, or when the server stops.

    With `caller`, the caller's targets must be written too. A caller with too many waiting requests
    waits for `OVER_LIMIT_S` instead. Raises `ClientDisconnect` once the client has disconnected.
    """

    async def wait() -> None:
        async for _ in events(services, id, "0", caller, watch=False):
            pass

    waiter = Waiter(receive=request.receive)
    with services.waits.one(request.state.caller) as allowed, anyio.move_on_after(seconds):
        await waiter.wait_for(wait() if allowed else anyio.sleep(OVER_LIMIT_S))


@dataclass(frozen=True, slots=True)
class _Followed:
    """A decode, as `service.feeds` reads it: its state, and its targets if there are stores."""

    services: Services
    id: str

    @property
    def stream(self) -> str:
        """Redis key of its events."""
        return job_events.key(self.services.store, self.id)

    def ask(self, pipe: Pipeline, now: float, viewers: Collection[str]) -> None:
        """Read the record; extend the subscriptions of the callers that view the events, and ask
        the worker for previews."""
        jobs = self.services.jobs
        pipe.hgetall(jobs.key(self.id))
        if self.services.objects.configs:
            pipe.hgetall(jobs.targets.key(self.id))
        if viewers:
            jobs.watch(self.id, viewers, now + POLL_SUBSCRIPTION_S, pipe)

    def parse(self, replies: Sequence[Any]) -> tuple[JobState | None, list[Target]]:
        """The state and all callers' targets."""
        row: dict[bytes, bytes] = replies[1] if self.services.objects.configs else {}
        owned = [Target.loads(value) for _, value in sorted(row.items())]
        return JobState.of(self.id, replies[0]), owned


async def events(
    services: Services, id: str, after: str, caller: str | None, watch: bool = True
) -> AsyncIterator[Event]:
    """Yield the events of a job that follow event `after`, until the job has ended.

    With `caller`, the job ends when the caller's targets are written too; with `watch` besides,
    reading extends the caller's subscription and asks the worker for previews, every `REFRESH_S`.
    Also stops when the server stops. If the events have expired, the last one is built from the
    job's record. Raises `RedisError`.
    """
    viewer = caller if watch else None
    last: Event | None = None
    with services.feeds.follow(_Followed(services, id), viewer) as follower:
        while await follower.wait():
            for event in follower.after(after):
                after = event.id
                if event.kind in job_events.END_OF.values():
                    last = event
                else:
                    yield event
            state, owned = follower.record
            ended, end = _last_event(state, owned, caller, last)
            if end is not None:
                yield end
            if ended:
                return


def _last_event(
    state: JobState | None, targets_of_all: Sequence[Target], caller: str | None, read: Event | None
) -> tuple[bool, Event | None]:
    """Whether a job has ended for the caller, and if so its last event.

    `read` is the last event in the stream; None once the stream has expired.
    """
    if state is None:
        return True, read
    if caller is not None:
        owned = (target for target in targets_of_all if target.caller == caller)
        state = targets.seen_by_caller(state, owned)
    if state.status not in ENDED:
        return False, None
    return True, Event.end(state, read.id if read else "")
