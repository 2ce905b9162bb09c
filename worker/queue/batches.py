"""Batches in Redis: many decodes with a source and a target each, of which few are queued at once.

Each item has a number, and a state of one byte in a string: waiting, queued, running, succeeded,
skipped (`k`), failed or canceled. All counts are those of the bytes in this string. Sources and
targets are in compressed pages of `PAGE` items. A hash holds what is known of active items, those
that are queued or running.

An API process takes a step of a batch under a lease: it lists sources, begins waiting items, and
records which active items have ended. The lease has a token; writes with another token have no
effect. So a step may be killed anywhere, and another process takes the next one.
"""

import contextlib
import json
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from models.errors import AfterimageError
from worker.queue import batch_scripts, counters, events, outbox
from worker.queue.batch_records import STATES, Active, Batch, Item, ItemStatus, Spec
from worker.queue.store import RECORD_TTL_S, Store

PAGE = 1000
"""Items of one page: compressed together, they take a few tens of bytes each."""
BATCH_TTL_S = 7 * 24 * 3600
"""How long a batch is kept after its last step, if no API process runs."""
LEASE_S = 10.0
"""How long a process may go on with a batch without renewing its lease."""
SAMPLE_S, SAMPLES = 10.0, 30
"""Interval and number of the samples from which the rate is computed: the last five minutes."""
ITEMS = "batch_items:"
"""Prefix of the counters of ended items, by their status."""


class BatchTaken(AfterimageError):
    """Another process has taken the lease of this batch."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches in the queue store."""

    store: Store

    def create(self, caller: str, spec: Spec, items: Sequence[Item], id: str) -> None:
        """Add a batch of these items; without any, they are listed below the spec's `source`.

        A batch with this id is left as it is.
        """
        self._register_webhooks(id, caller, spec)
        now = time.time()
        record: dict[str, Any] = {
            "caller": caller, "spec": json.dumps(asdict(spec)), "created": now, "ended": 0,
            "canceled": 0, "listed": int(not spec.source), "after": "", "problem": "",
            "progressed": now, "samples": json.dumps([(now, 0, 0)]), "lease": "",
        }  # fmt: skip
        keys = self._keys(id)
        with self.store.queue.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(keys[0])  # type: ignore[no-untyped-call]
            if self.store.queue.exists(keys[0]):
                return
            pipe.multi()
            pipe.hset(keys[0], mapping=record)  # type: ignore[arg-type]
            if items:
                pipe.set(keys[1], STATES["waiting"] * len(items))
                pages = dict(_pages(0, items, spec.seed))
                pipe.hset(keys[4], mapping=pages)  # type: ignore[arg-type]
            self._touch(pipe, id, BATCH_TTL_S)
            pipe.zadd(self.due, {id: now})
            pipe.execute()

    def get(self, id: str) -> Batch | None:
        """The batch and its counts; None if there is none."""
        with self.store.queue.pipeline() as pipe:
            pipe.hgetall(self._keys(id)[0])
            pipe.get(self._keys(id)[1])
            row, states = pipe.execute()
        return Batch.of(id, row, states or b"")

    def running(self) -> list[Batch]:
        """All batches that have not ended."""
        ids = [value.decode() for value in self.store.queue.zrange(self.due, 0, -1)]  # type: ignore[union-attr]
        return [batch for id in ids if (batch := self.get(id)) is not None]

    def items(self, batch: Batch, numbers: Iterable[int]) -> dict[int, Item]:
        """The items with these numbers."""
        wanted = sorted(numbers)
        pages = sorted({number // PAGE for number in wanted})
        if not pages:
            return {}
        found: list[bytes] = self.store.queue.hmget(self._keys(batch.id)[4], [*map(str, pages)])  # type: ignore[assignment]
        read = {
            page: json.loads(zlib.decompress(data)) for page, data in zip(pages, found, strict=True)
        }
        rows = {number: read[number // PAGE][number % PAGE] for number in wanted}
        return {
            n: Item(row[0], row[1], row[2] if len(row) > 2 else batch.spec.seed)
            for n, row in rows.items()
        }

    def failed(self, id: str, after: int, limit: int) -> dict[int, dict[str, str]]:
        """The problems of the first `limit` failed items whose number is above `after`."""
        states: bytes = self.store.queue.get(self._keys(id)[1]) or b""  # type: ignore[assignment]
        numbers: list[int] = []
        while len(numbers) < limit and (after := states.find(b"f", after + 1)) >= 0:
            numbers.append(after)
        if not numbers:
            return {}
        values: list[bytes | None] = self.store.queue.hmget(self._keys(id)[3], [*map(str, numbers)])  # type: ignore[assignment]
        pairs = zip(numbers, values, strict=True)
        return {number: json.loads(value) for number, value in pairs if value}  # else retried since

    def cancel(self, id: str) -> bool:
        """Cancel the waiting items; the next step cancels queued ones. False if it has ended."""
        return bool(self._run(batch_scripts.CANCEL, id))

    def retry(self, batch: Batch) -> bool:
        """Let the failed items wait again; False if there are none."""
        self._register_webhooks(batch.id, batch.caller, batch.spec)  # the end has removed them
        return bool(self._run(batch_scripts.RETRY, batch.id, batch.id))

    def lease(self) -> "Lease | None":
        """Take the lease of a batch that is due; None if there is none."""
        token = uuid.uuid4().hex
        prefix = self.store.key("batch", "")
        id = self.store.queue.eval(batch_scripts.LEASE, 1, self.due, token, LEASE_S, prefix)
        return None if id is None else Lease(self, id.decode(), token)

    def _register_webhooks(self, id: str, caller: str, spec: Spec) -> None:
        for url in spec.webhooks:
            outbox.register(self.store, id, caller, url)

    def _run(self, script: str, id: str, *arguments: str | float) -> Any:
        keys = self._keys(id)
        return self.store.queue.eval(script, len(keys), *keys, *arguments)

    def _touch(self, pipe: redis.client.Pipeline, id: str, seconds: int) -> None:
        """Let all keys of a batch expire in `seconds`, as part of the transaction `pipe`."""
        others = (events.key(self.store, id), self.store.key("webhooks", "of", id))
        for key in (*self._keys(id)[:5], *others):
            pipe.expire(key, seconds)

    def _keys(self, id: str) -> tuple[str, ...]:
        """Keys of the record (hash), states (string), active items (hash: number -> `Active`),
        problems (hash: number -> problem) and pages (hash: number -> page); then `due`, counters.
        """
        names = ("batch", "batch-states", "batch-active", "batch-problems", "batch-pages")
        return *(self.store.key(name, id) for name in names), self.due, counters.key(self.store)

    @property
    def due(self) -> str:
        """Key of a sorted set: batch that has not ended -> time of its next step."""
        return self.store.key("batches")


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
            self.batches._touch(pipe, self.id, BATCH_TTL_S)
            pipe.execute()

    def due_in(self, seconds: float) -> None:
        """Make the batch due in `seconds`, to this process and others."""
        self._write(batch_scripts.DUE_IN, seconds, self.id)

    def claim(self, count: int, most: int) -> list[int]:
        """Make up to `count` waiting items active, unless `most` are; returns their numbers."""
        return [int(number) for number in self._write(batch_scripts.CLAIM, count, most)]

    def active(self) -> dict[int, Active]:
        """The active items by number."""
        key = self.batches._keys(self.id)[2]
        row: dict[bytes, bytes] = self.batches.store.queue.hgetall(key)  # type: ignore[assignment]
        return {int(number): Active(**json.loads(value)) for number, value in sorted(row.items())}

    def note(self, number: int, active: Active) -> bool:
        """Record what is known of an active item; False if it is not active any more."""
        value = {k: v for k, v in asdict(active).items() if v}
        return bool(self._write(batch_scripts.NOTE, number, json.dumps(value)))

    def settle(self, changes: Iterable[tuple[int, ItemStatus, Mapping[str, str] | None]]) -> None:
        """Change the status of active items; failed ones with their problem."""
        rows = [
            (n, STATES[status], json.dumps(problem) if problem else "")
            for n, status, problem in changes
        ]
        if rows:
            self._write(batch_scripts.SETTLE, json.dumps(rows), ITEMS)

    def extend(self, batch: Batch, items: Sequence[Item], after: str, listed: bool) -> None:
        """Add listed items; `after` is the key of the last object that was read."""
        begun = batch.total - batch.total % PAGE
        former = [*self.batches.items(batch, range(begun, batch.total)).values()]
        pages = _pages(begun // PAGE, [*former, *items], batch.spec.seed) if items else ()
        arguments = [part for page in pages for part in page]
        numbers = batch.total, len(items), after, int(listed)
        self._write(batch_scripts.EXTEND, *numbers, *arguments)

    def fail_listing(self, problem: Mapping[str, str]) -> None:
        """End the listing with a problem. The items that are known go on."""
        values = {"listed": 1, "problem": json.dumps(problem)}
        self.batches.store.queue.hset(self.batches._keys(self.id)[0], mapping=values)  # type: ignore[arg-type]

    def report(self, batch: Batch, former: Mapping[str, int]) -> None:
        """Append an event if the counts have changed since `former`, and a sample of the rate."""
        store, now = self.batches.store, time.time()
        with store.queue.pipeline() as pipe:
            if batch.counts != former:
                events.append(store, pipe, self.id, "progress", total=batch.total, **batch.counts)
            if now - batch.samples[-1][0] >= SAMPLE_S:
                done = batch.total - batch.unfinished
                samples = [*batch.samples[1 - SAMPLES :], (now, batch.counts["succeeded"], done)]
                pipe.hset(self.batches._keys(self.id)[0], "samples", json.dumps(samples))
            pipe.execute()

    def end(self) -> bool:
        """End the batch, with its event and its webhooks, if all items have ended."""
        batches, store = self.batches, self.batches.store
        record, states, *_ = batches._keys(self.id)
        with store.queue.pipeline() as pipe:
            try:
                pipe.watch(record, states)  # type: ignore[no-untyped-call]
                batch = batches.get(self.id)
                if batch is None or batch.unfinished or not batch.listed or not self._held():
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
                batches._touch(pipe, self.id, RECORD_TTL_S)
                pipe.execute()
                return True
            except redis.WatchError:  # retried meanwhile, or taken
                return False

    def _held(self) -> bool:
        token = self.batches.store.queue.hget(self.batches._keys(self.id)[0], "lease")
        return token == self.token.encode()

    def _write(self, script: str, *arguments: Any) -> Any:
        result = self.batches._run(script, self.id, self.token, *arguments)
        if result is None:
            raise BatchTaken(f"batch {self.id} was taken by another process")
        return result


def _pages(first: int, items: Sequence[Item], seed: int) -> Iterable[tuple[int, bytes]]:
    """Numbers and contents of the pages of `items`; seeds that equal `seed` are left out."""
    for i in range(0, len(items), PAGE):
        rows = [item[:2] if item.seed == seed else item for item in items[i : i + PAGE]]
        yield first + i // PAGE, zlib.compress(json.dumps(rows, separators=(",", ":")).encode())
