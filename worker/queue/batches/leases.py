"""Leases of batches: the right of one process to go on with a batch for some seconds."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from models.errors import AfterimageError
from worker.queue import events, outbox
from worker.queue.batches import scripts
from worker.queue.batches.records import STATES, Active, Batch, Item, ItemStatus
from worker.queue.batches.store import BATCH_TTL_S, PAGE, Batches, Packed
from worker.queue.store import RECORD_TTL_S

LEASE_S = 10.0
"""How long a process may go on with a batch without renewing its lease."""
SAMPLE_S, SAMPLES = 10.0, 30
"""Interval and number of the samples from which the rate is computed: the last five minutes."""
ITEMS = "batch_items:"
"""Prefix of the counters of ended items, by their status."""


class BatchTaken(AfterimageError):
    """Another process has taken the lease of this batch."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to take a step of a batch. Writes raise `BatchTaken` if another process has it."""

    batches: Batches
    id: str
    token: str

    def renew(self) -> None:
        """Keep the lease for another `LEASE_S`, and the batch for `BATCH_TTL_S`."""
        self.due_in(LEASE_S)
        with self.batches.store.queue.pipeline(transaction=False) as pipe:
            self.batches.touch(pipe, self.id, BATCH_TTL_S)
            pipe.execute()

    def due_in(self, seconds: float) -> None:
        """Make the batch due in `seconds`, to this process and others."""
        self._write(scripts.DUE_IN, seconds, self.id)

    def claim(self, count: int, most: int) -> list[int]:
        """Make up to `count` waiting items active, unless `most` are; returns their numbers."""
        return [int(number) for number in self._write(scripts.CLAIM, count, most)]

    def active(self) -> dict[int, Active]:
        """The active items by number."""
        key = self.batches.keys_of(self.id)[2]
        row: dict[bytes, bytes] = self.batches.store.queue.hgetall(key)  # type: ignore[assignment]
        return {int(number): Active(**json.loads(value)) for number, value in sorted(row.items())}

    def note(self, number: int, active: Active) -> bool:
        """Record what is known of an active item; False if it is not active any more."""
        value = {k: v for k, v in asdict(active).items() if v}
        return bool(self._write(scripts.NOTE, number, json.dumps(value)))

    def settle(self, changes: Iterable[tuple[int, ItemStatus, Mapping[str, str] | None]]) -> None:
        """Change the status of active items; failed ones with their problem."""
        rows = [
            (n, STATES[status], json.dumps(problem) if problem else "")
            for n, status, problem in changes
        ]
        if rows:
            self._write(scripts.SETTLE, json.dumps(rows), ITEMS)

    def extend(self, batch: Batch, items: Sequence[Item], after: str, listed: bool) -> None:
        """Add listed items; `after` is the key of the last object that was read."""
        begun = batch.total - batch.total % PAGE
        former = [*self.batches.items(batch, range(begun, batch.total)).values()]
        added = Packed.of([*former, *items] if items else (), batch.spec.seed, begun // PAGE)
        arguments = [part for page in added.pages.items() for part in page]
        numbers = batch.total, len(items), after, int(listed)
        self._write(scripts.EXTEND, *numbers, *arguments)

    def fail_listing(self, problem: Mapping[str, str]) -> None:
        """End the listing with a problem. The items that are known go on."""
        values = {"listed": 1, "problem": json.dumps(problem)}
        self.batches.store.queue.hset(self.batches.keys_of(self.id)[0], mapping=values)  # type: ignore[arg-type]

    def report(self, batch: Batch) -> None:
        """Append an event if the counts have changed, and a sample of the rate."""
        store, now, fields = self.batches.store, time.time(), dict[str, str]()
        with store.queue.pipeline() as pipe:
            if batch.counts != batch.reported:
                events.append(store, pipe, self.id, "progress", total=batch.total, **batch.counts)
                fields["reported"] = json.dumps(batch.counts)
            if now - batch.samples[-1][0] >= SAMPLE_S:
                done = batch.total - batch.unfinished
                samples = [*batch.samples[1 - SAMPLES :], (now, batch.counts["succeeded"], done)]
                fields["samples"] = json.dumps(samples)
            if fields:
                pipe.hset(self.batches.keys_of(self.id)[0], mapping=fields)  # type: ignore[arg-type]
            pipe.execute()

    def end(self) -> bool:
        """End the batch, with its event and its webhooks, if all items have ended."""
        batches, store = self.batches, self.batches.store
        record, states, *_ = batches.keys_of(self.id)
        with store.queue.pipeline() as pipe:
            try:
                pipe.watch(record, states)  # type: ignore[no-untyped-call]
                batch = batches.get(self.id)
                if batch is None or batch.ended or batch.unfinished or not batch.listed:
                    return False
                if not self._held():
                    return False
                pipe.multi()
                pipe.hset(record, "ended", str(time.time()))
                pipe.zrem(batches.due, self.id)
                data: dict[str, Any] = {
                    "id": self.id,
                    "status": "canceled" if batch.canceled else "ended",
                }
                data |= {"total": batch.total, **batch.counts}
                events.append(store, pipe, self.id, "ended", **data)
                outbox.job_ended(store, self.id, "batch.ended", data, pipe)
                batches.touch(pipe, self.id, RECORD_TTL_S)
                pipe.execute()
                return True
            except redis.WatchError:  # retried meanwhile, or taken
                return False

    def _held(self) -> bool:
        token = self.batches.store.queue.hget(self.batches.keys_of(self.id)[0], "lease")
        return token == self.token.encode()

    def _write(self, script: str, *arguments: Any) -> Any:
        result = self.batches.run(script, self.id, self.token, *arguments)
        if result is None:
            raise BatchTaken(f"batch {self.id} was taken by another process")
        return result


def take(batches: Batches) -> Lease | None:
    """Take the lease of a batch that is due; None if there is none."""
    token, prefix = uuid.uuid4().hex, batches.store.key("batch", "")
    arguments = token, LEASE_S, prefix
    id = batches.store.queue.eval(scripts.LEASE, 1, batches.due, *arguments)
    return None if id is None else Lease(batches, id.decode(), token)
