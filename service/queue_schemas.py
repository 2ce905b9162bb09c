"""JSON documents of `/v1/queue`."""

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from worker.queue.records import JobState, Priority


class WaitingCaller(BaseModel):
    """A caller whose jobs wait."""

    priority: Priority
    caller: str
    jobs: int
    unserved_s: float = Field(description="Seconds for which its first job has been the first.")


class RunningJob(BaseModel):
    """A job that a worker runs."""

    id: str
    caller: str
    priority: Priority
    tier: str
    worker: str
    step: int
    total: int
    eta_s: float | None  # predicted seconds until the job ends
    width: int
    height: int

    @classmethod
    def of(cls, state: JobState, eta_s: float | None) -> "RunningJob":
        """Return the operators' view of a running job."""
        return cls(
            id=state.id, caller=state.caller, priority=state.priority, tier=state.decode.tier,
            worker=state.worker, step=state.step, total=state.total,
            eta_s=None if eta_s is None else round(eta_s, 1),
            width=state.decode.width, height=state.decode.height,
        )  # fmt: skip


_WORKER: JsonDict = {
    "name": "gpu-1-42", "device": "cuda", "age_s": 86400.0, "megapixel_steps_per_s": 21.5,
    "drained": False,
}  # fmt: skip
_QUARANTINED: JsonDict = {"digest": "e3b0c442" * 8, "until": "2026-01-01T12:00:00Z"}


class QueueWorker(BaseModel):
    """A live worker."""

    model_config = ConfigDict(json_schema_extra={"examples": [_WORKER]})

    name: str
    device: str
    age_s: float  # since it started
    megapixel_steps_per_s: float | None  # mean over its jobs; null before the first
    drained: bool  # it takes no further jobs


class QuarantinedBitstream(BaseModel):
    """A bitstream that is refused because workers crashed on it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_QUARANTINED]})

    digest: str
    until: datetime

    @classmethod
    def of(cls, digest: str, until: float) -> "QuarantinedBitstream":
        """Return the operators' view; `until` is in seconds since the epoch."""
        return cls(digest=digest, until=datetime.fromtimestamp(int(until), UTC))


_EXAMPLE: JsonDict = {
    "interactive": 2, "batch": 1200,
    "waiting": [
        {"priority": "batch", "caller": "library", "jobs": 1200, "unserved_s": 9.5},
        {"priority": "interactive", "caller": "app", "jobs": 2, "unserved_s": 0.4},
    ],
    "running": [{
        "id": "3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e", "caller": "app", "priority": "interactive",
        "tier": "ddim-10", "worker": "gpu-1-42", "step": 2, "total": 10, "eta_s": 1.4,
        "width": 768, "height": 512,
    }],
    "workers": [_WORKER],
    "quarantined": [_QUARANTINED],
}  # fmt: skip


class Queue(BaseModel):
    """Everything that waits and runs."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    interactive: int  # jobs that wait
    batch: int
    waiting: list[WaitingCaller] = Field(
        description="The callers with the most waiting jobs, at most 100."
    )
    running: list[RunningJob]
    workers: list[QueueWorker]
    quarantined: list[QuarantinedBitstream]
