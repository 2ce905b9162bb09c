"""Events of a job, in a Redis stream that is bounded, expires, and can be read from any id."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from redis.client import Pipeline

from worker.queue.records import JobState, Status
from worker.queue.store import RECORD_TTL_S, Store

Kind = Literal[
    "queued", "started", "progress", "preview", "completed", "failed", "canceled", "ended"
]
"""The last is that of a batch, `worker.queue.batches.store`."""
END_OF: dict[Status, Kind] = {
    "succeeded": "completed", "failed": "failed", "canceled": "canceled"
}  # fmt: skip
"""Final status of a job -> kind of its last event."""
MAX_EVENTS = 256
"""Length of a job's stream; older events are dropped."""
ENDED_TTL_S = 600
"""How long the stream of an ended job is kept; the job's record holds the result as well."""
MAX_PROGRESS_EVENTS = 100
"""Largest number of progress events of one attempt."""


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of a job's stream; ids increase over all attempts of the job."""

    id: str
    kind: Kind
    data: dict[str, Any]

    @classmethod
    def of(cls, entry: tuple[bytes, dict[bytes, bytes]]) -> "Event":
        """Parse a stream entry, in the form in which redis-py returns it."""
        event_id, fields = entry
        kind: Kind = fields[b"kind"].decode()  # type: ignore[assignment]
        return cls(event_id.decode(), kind, json.loads(fields[b"data"]))

    @classmethod
    def end(cls, state: JobState, event_id: str = "") -> "Event":
        """The last event of an ended job, made from its record.

        `event_id` is the id of its entry in the stream, empty once that has expired.
        """
        data = {"error": state.error} if state.error else {}
        return cls(event_id or f"{int(state.ended * 1000)}-0", END_OF[state.status], data)


def key(store: Store, job_id: str) -> str:
    """Redis key of the job's stream."""
    return store.key("events", job_id)


def append(store: Store, pipe: Pipeline, job_id: str, kind: Kind, **data: Any) -> None:
    """Add an event to the job's stream, as part of the transaction `pipe`."""
    name = key(store, job_id)
    pipe.xadd(name, {"kind": kind, "data": json.dumps(data)}, maxlen=MAX_EVENTS, approximate=False)
    pipe.expire(name, RECORD_TTL_S)


def is_reported(step: int, total: int) -> bool:
    """True for the steps that get a progress event, at most `MAX_PROGRESS_EVENTS` of `total`."""
    return step * MAX_PROGRESS_EVENTS // total != (step - 1) * MAX_PROGRESS_EVENTS // total
