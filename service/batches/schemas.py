"""JSON documents about batches."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from service import prefix
from service.seeds import SeedText
from worker.queue.batches import records
from worker.queue.records import Priority

_ID = "7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f"
_FAILED: JsonDict = {
    "number": 17, "source": "store:incoming/holiday/17.msh",
    "target": "store:outgoing/holiday/17.webp", "seed": 0, "seed_text": "0",
    "problem": {
        "type": "urn:afterimage:problem:object-not-found",
        "detail": "there is no object store:incoming/holiday/17.msh",
    },
}  # fmt: skip
BATCH: JsonDict = {
    "id": _ID, "status": "running", "tier": "perceptual", "priority": "batch",
    "on_existing": "skip", "created": "2026-01-01T12:00:00Z", "ended": None, "total": 1200,
    "listing": False, "problem": None,
    "counts": {"waiting": 1000, "queued": 60, "running": 4, "succeeded": 130, "skipped": 5,
               "failed": 1, "canceled": 0},
    "pictures_per_minute": 26.0, "eta_s": 2455.4, "failed": [_FAILED], "next": None,
}  # fmt: skip

LISTED: JsonDict = {**BATCH, "failed": []}


class Counts(BaseModel):
    """Items of a batch by their status."""

    waiting: int
    queued: int
    running: int
    succeeded: int
    skipped: int  # the target existed
    failed: int
    canceled: int


class ItemProblem(BaseModel):
    """Why an item failed, in the words of problem documents."""

    type: str
    detail: str


class FailedItem(BaseModel):
    """An item that failed."""

    number: int
    source: str
    target: str
    seed: int
    seed_text: SeedText
    problem: ItemProblem


class Batch(BaseModel):
    """The state of a batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [BATCH]})

    id: str
    status: Literal["running", "ended", "canceled"]
    tier: str
    priority: Priority
    on_existing: Literal["skip", "replace"]
    created: datetime
    ended: datetime | None
    total: int  # items that are known
    listing: bool  # whether more items may be found below the prefix
    problem: ItemProblem | None = Field(description="Why the prefix could not be listed.")
    counts: Counts
    pictures_per_minute: float  # of the last minutes; of the whole time once the batch has ended
    eta_s: float | None
    failed: list[FailedItem] = Field(description="One page of the failed items.")
    next: str | None = Field(description="Path of the next page.")

    @classmethod
    def of(cls, batch: records.Batch, failed: list[FailedItem], limit: int = 0) -> "Batch":
        """The public view of a batch with up to `limit` failed items."""
        more = bool(failed) and len(failed) == limit
        eta_s = batch.eta_s
        return cls(
            id=batch.id, status=_status(batch), tier=batch.spec.tier, priority=batch.spec.priority,
            on_existing=batch.spec.on_existing, total=batch.total, listing=not batch.listed,
            created=datetime.fromtimestamp(batch.created, UTC),
            ended=datetime.fromtimestamp(batch.ended, UTC) if batch.ended else None,
            problem=ItemProblem(**batch.problem) if batch.problem else None,
            counts=Counts(**batch.counts), pictures_per_minute=round(60 * batch.rates()[0], 1),
            eta_s=None if eta_s is None else round(eta_s, 1), failed=failed,
            next=_next(batch.id, failed[-1].number, limit) if more else None,
        )  # fmt: skip


class BatchPage(BaseModel):
    """Some batches, newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"batches": [LISTED], "next": None}]})

    batches: list[Batch] = Field(description="Without their failed items.")
    next: str | None = Field(description="Path of the next page.")

    @classmethod
    def of(cls, batches: Sequence[records.Batch], limit: int) -> "BatchPage":
        """The public view of up to `limit` batches."""
        path = None
        if len(batches) == limit:
            path = prefix.public(f"/v1/batches?after={batches[-1].id}&limit={limit}")
        return cls(batches=[Batch.of(batch, []) for batch in batches], next=path)


def _next(id: str, after: int, limit: int) -> str:
    return prefix.public(f"/v1/batches/{id}?after={after}&limit={limit}")


def failed_items(
    items: Mapping[int, records.Item], problems: Mapping[int, Mapping[str, str]]
) -> list[FailedItem]:
    """The public view of failed items."""
    return [
        FailedItem(
            number=n, **items[n]._asdict(), seed_text=str(items[n].seed),
            problem=ItemProblem(**problems[n]),
        )
        for n in sorted(problems)
    ]  # fmt: skip


def _status(batch: records.Batch) -> Literal["running", "ended", "canceled"]:
    if not batch.ended:
        return "running"
    return "canceled" if batch.canceled else "ended"
