"""Records of batches: what their items share, and what has become of the items."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from models.image import OutputFormat
from models.tiers import Settings
from worker.queue.records import Priority

MAX_ITEMS = 1_000_000
"""Largest number of items of one batch."""

ItemStatus = Literal["waiting", "queued", "running", "succeeded", "skipped", "failed", "canceled"]
STATES: Mapping[ItemStatus, str] = {
    "waiting": "w", "queued": "q", "running": "r", "succeeded": "s", "skipped": "k",
    "failed": "f", "canceled": "c",
}  # fmt: skip


class Item(NamedTuple):
    """What one item reads and writes."""

    source: str
    target: str
    seed: int


@dataclass(frozen=True, slots=True)
class Spec:
    """What all items of a batch share. With a `source`, the items are listed below that prefix."""

    tier: str
    settings: Settings
    format: OutputFormat | None = None  # None: the one that each target's suffix names
    realism: float = 1.0
    seed: int = 0
    priority: Priority = "batch"
    on_existing: Literal["skip", "replace"] = "skip"
    webhooks: Sequence[str] = ()
    source: str = ""
    target: str = ""
    suffix: str = ".msh"  # of the sources below the prefix

    @classmethod
    def loads(cls, text: str) -> "Spec":
        """Parse the JSON of a spec."""
        values = json.loads(text)
        return cls(**{**values, "settings": Settings(**values["settings"])})


@dataclass(frozen=True, slots=True)
class Active:
    """What is known of an item that is queued or running."""

    id: str = ""  # of its decode; empty until its source was read
    sent: bool = False  # whether the decode has been submitted; False: perhaps
    began: float = 0.0  # time of the first try to begin it, seconds since the epoch
    tries: int = 0  # tries that failed because a store was away
    at: float = 0.0  # time of the next try


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, with the counts of its items, at one time."""

    id: str
    caller: str
    spec: Spec
    created: float
    ended: float  # 0: not yet
    canceled: bool
    listed: bool  # whether all items are known
    after: str  # key of the last object that the listing has read
    problem: Mapping[str, str] | None  # why the listing failed
    progressed: float  # when the last item ended
    samples: Sequence[tuple[float, int, int]]  # time, succeeded items, ended items
    reported: Mapping[str, int]  # the counts of the latest event
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, id: str, row: Mapping[bytes, bytes], states: bytes) -> "Batch | None":
        """Parse a record; None if there is none."""
        if b"spec" not in row:
            return None
        fields = {k.decode(): v.decode() for k, v in row.items()}
        return cls(
            id, fields["caller"], Spec.loads(fields["spec"]), float(fields["created"]),
            float(fields["ended"]), fields["canceled"] == "1", fields["listed"] == "1",
            fields["after"], json.loads(fields["problem"] or "null"), float(fields["progressed"]),
            [tuple(s) for s in json.loads(fields["samples"])], json.loads(fields["reported"]),
            {name: states.count(state.encode()) for name, state in STATES.items()},
        )  # fmt: skip

    @property
    def total(self) -> int:
        """Number of the items that are known."""
        return sum(self.counts.values())

    @property
    def unfinished(self) -> int:
        """Number of items that have not ended."""
        return sum(self.counts[status] for status in ("waiting", "queued", "running"))

    def rates(self) -> tuple[float, float]:
        """Pictures, and ended items of any status, per second of the last minutes; 0: unknown."""
        began, pictures, items = (self.created, 0, 0) if self.ended else self.samples[0]
        seconds = (self.ended or time.time()) - began
        if seconds <= 0:
            return 0.0, 0.0
        ended = self.total - self.unfinished
        return (self.counts["succeeded"] - pictures) / seconds, (ended - items) / seconds

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last item ends, at the present rate; None if that is unknown."""
        rate = self.rates()[1]
        return self.unfinished / rate if rate > 0 and self.listed and not self.ended else None
