"""JSON documents about batches."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from models import tiers
from models.image import OutputFormat
from service import prefix
from worker.queue import batch_records
from worker.queue.batch_records import MAX_ITEMS
from worker.queue.records import Priority

_ID = "7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f"
REQUEST: JsonDict = {
    "source": "store:incoming/holiday/", "target": "store:outgoing/holiday/", "format": "webp",
    "tier": "perceptual", "on_existing": "skip",
}  # fmt: skip
REQUEST_OF_ITEMS: JsonDict = {
    "items": [
        {"source": "store:incoming/a.msh", "target": "store:outgoing/a.webp"},
        {"source": "store:incoming/b.msh", "target": "store:outgoing/b.webp", "seed": 7},
    ],
    "tier": "perceptual",
}
_FAILED: JsonDict = {
    "number": 17, "source": "store:incoming/holiday/17.msh",
    "target": "store:outgoing/holiday/17.webp", "seed": 0,
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


class BatchItem(BaseModel):
    """A bitstream to decode, and where to write its picture."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(description="An object `store:NAME/KEY`.")
    target: str = Field(description="An object `store:NAME/KEY`.")
    seed: int | None = Field(None, ge=0, le=tiers.MAX_SEED, description="Default: the batch's.")


class BatchRequest(BaseModel):
    """A batch: `items`, or the prefixes `source` and `target`, and what all items share."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [REQUEST, REQUEST_OF_ITEMS]}
    )

    items: list[BatchItem] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="The items, instead of prefixes.",
    )
    source: str | None = Field(
        None,
        description="A prefix `store:NAME/PREFIX/`: all objects below it whose key ends with "
        "`suffix` are decoded.",
    )
    target: str | None = Field(
        None,
        description="A prefix: pictures get the names of the sources, with the format's suffix.",
    )
    suffix: str = Field(".msh", min_length=2, max_length=32, pattern="^[A-Za-z0-9._-]+$")
    tier: str = Field("perceptual", json_schema_extra={"enum": [*tiers.TIERS]})
    seed: int = Field(0, ge=0, le=tiers.MAX_SEED)
    steps: int | None = Field(None, ge=1, le=tiers.MAX_STEPS)
    eta: float | None = Field(None, ge=0, le=1)
    gamma: float | None = Field(None, ge=0, le=1)
    sampler: tiers.Sampler | None = None
    guidance: float | None = Field(None, ge=0, le=tiers.MAX_GUIDANCE)
    format: OutputFormat | None = Field(
        None, description="Default: the one that each target's suffix names; for prefixes, png."
    )
    realism: float = Field(
        1.0, ge=0, le=1, description="0: the codec's picture, 1: the tier's; between, a mix."
    )
    priority: Priority = "batch"
    webhook: list[str] = Field(
        [], max_length=8, description="https URLs that get `batch.ended` when the batch ends."
    )
    on_existing: Literal["skip", "replace"] = Field(
        "skip", description="What to do about a target that exists already."
    )


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
    def of(cls, batch: batch_records.Batch, failed: list[FailedItem], limit: int = 0) -> "Batch":
        """The public view of a batch with up to `limit` failed items."""
        path = f"/v1/batches/{batch.id}"
        more = bool(failed) and len(failed) == limit
        eta_s = batch.eta_s
        return cls(
            id=batch.id,
            status=_status(batch),
            tier=batch.spec.tier,
            priority=batch.spec.priority,
            on_existing=batch.spec.on_existing,
            created=datetime.fromtimestamp(batch.created, UTC),
            ended=datetime.fromtimestamp(batch.ended, UTC) if batch.ended else None,
            total=batch.total,
            listing=not batch.listed,
            problem=ItemProblem(**batch.problem) if batch.problem else None,
            counts=Counts(**batch.counts),
            pictures_per_minute=round(60 * batch.rates()[0], 1),
            eta_s=None if eta_s is None else round(eta_s, 1),
            failed=failed,
            next=prefix.public(f"{path}?after={failed[-1].number}&limit={limit}") if more else None,
        )


def failed_items(
    items: Mapping[int, batch_records.Item], problems: Mapping[int, Mapping[str, str]]
) -> list[FailedItem]:
    """The public view of failed items."""
    return [
        FailedItem(number=n, **items[n]._asdict(), problem=ItemProblem(**problems[n]))
        for n in sorted(problems)
    ]


def _status(batch: batch_records.Batch) -> Literal["running", "ended", "canceled"]:
    if not batch.ended:
        return "running"
    return "canceled" if batch.canceled else "ended"
