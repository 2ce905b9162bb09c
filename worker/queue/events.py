"""What happens to a job, told in a Redis stream: bounded, expiring, readable from any point on."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from redis.client import Pipeline

from worker.queue.records import JobState, Status
from worker.queue.store import RECORD_TTL_S, Store

Kind = Literal["queued", "started", "progress", "preview", "completed", "failed", "canceled"]
END_OF: dict[Status, Kind] = {
    "succeeded": "completed", "failed": "failed", "canceled": "canceled"
}  # fmt: skip
"""How the end of a job is told."""
KEPT = 256
"""Events of a job that are kept: the last ones."""
ENDED_TTL_S = 600
"""How long they are kept once it has ended; its record tells the end as well."""
PARTS = 100
"""Progress is told at most this often in a job."""


@dataclass(frozen=True, slots=True)
class Event:
    """`id` rises from event to event, over all attempts of a job."""

    id: str
    kind: Kind
    data: dict[str, Any]

    @classmethod
    def of(cls, entry: tuple[bytes, dict[bytes, bytes]]) -> "Event":
        """An entry of the stream."""
        event_id, fields = entry
        kind: Kind = fields[b"kind"].decode()  # type: ignore[assignment]
        return cls(event_id.decode(), kind, json.loads(fields[b"data"]))

    @classmethod
    def end(cls, state: JobState) -> "Event":
        """What is told of the end of a job by its record."""
        data = {"error": state.error} if state.error else {}
        return cls(f"{int(state.ended * 1000)}-0", END_OF[state.status], data)


def key(store: Store, job_id: str) -> str:
    """The stream's."""
    return store.key("events", job_id)


def tell(store: Store, pipe: Pipeline, job_id: str, kind: Kind, **data: Any) -> None:
    """Add an event, as a part of the transaction that makes it true."""
    name = key(store, job_id)
    pipe.xadd(name, {"kind": kind, "data": json.dumps(data)}, maxlen=KEPT, approximate=False)
    pipe.expire(name, RECORD_TTL_S)


def worth_telling(step: int, total: int) -> bool:
    """Whether progress to `step` is one of at most `PARTS` events."""
    return step * PARTS // total != (step - 1) * PARTS // total
