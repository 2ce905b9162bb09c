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
import itertools
import json
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import redis

from worker.queue import counters, events, outbox
from worker.queue.batches import index, scripts
from worker.queue.batches.records import STATES, Batch, Item, Spec
from worker.queue.store import Store

PAGE = 1000
"""Items of one page: compressed together, they take a few tens of bytes each."""
BATCH_TTL_S = 7 * 24 * 3600
"""How long a batch is kept after its last step, if no API process runs."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Items, compressed."""

    count: int
    pages: Mapping[int, bytes]

    @classmethod
    def of(cls, items: Iterable[Item], seed: int, first: int = 0) -> "Packed":
        """Pack items in pages from number `first`; seeds that equal `seed` are left out."""
        rest, count, found = iter(items), 0, {}
        while part := list(islice(rest, PAGE)):
            rows = [item[:2] if item.seed == seed else item for item in part]
            data = json.dumps(rows, separators=(",", ":")).encode()
            found[first + count // PAGE] = zlib.compress(data)
            count += len(part)
        return cls(count, found)


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches in the queue store."""

    store: Store

    def create(self, caller: str, spec: Spec, items: Packed, id: str) -> None:
        """Add a batch of these items; without any, they are listed below the spec's `source`.

        A batch with this id is left as it is.
        """
        self._register_webhooks(id, caller, spec)
        now = time.time()
        record: dict[str, Any] = {
            "caller": caller, "spec": json.dumps(asdict(spec)), "created": now, "ended": 0,
            "canceled": 0, "listed": int(not spec.source), "after": "", "problem": "",
            "progressed": now, "samples": json.dumps([(now, 0, 0)]), "lease": "", "reported": "{}",
        }  # fmt: skip
        keys = self.keys_of(id)
        with self.store.queue.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(keys[0])  # type: ignore[no-untyped-call]
            if self.store.queue.exists(keys[0]):
                return
            pipe.multi()
            pipe.hset(keys[0], mapping=record)  # type: ignore[arg-type]
            if items.count:
                pipe.set(keys[1], STATES["waiting"] * items.count)
                pipe.hset(keys[4], mapping=items.pages)  # type: ignore[arg-type]
            self.touch(pipe, id, BATCH_TTL_S)
            pipe.zadd(self.due, {id: now})
            index.add(self.store, pipe, id, caller, now)
            pipe.execute()
        index.forget_expired(self.store, caller)

    def get(self, id: str) -> Batch | None:
        """The batch and its counts; None if there is none."""
        with self.store.queue.pipeline() as pipe:
            self.read(id, pipe)
            row, states = pipe.execute()
        return Batch.of(id, row, states or b"")

    def newest(self, caller: str | None, after: str, limit: int) -> list[Batch] | None:
        """Up to `limit` batches of a caller, or of all for None, newest first.

        They are older than the batch `after`, if it is given; None if there is no such batch.
        """
        ids = index.newest(self.store, caller, after)
        if ids is None:
            return None
        kept = (batch for id in ids if (batch := self.get(id)) is not None)
        return [*itertools.islice(kept, limit)]

    def read(self, id: str, pipe: redis.client.Pipeline) -> None:
        """Read what `Batch.of` takes, the record and the states, as part of `pipe`."""
        pipe.hgetall(self.keys_of(id)[0])
        pipe.get(self.keys_of(id)[1])

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
        found: list[bytes] = self.store.queue.hmget(self.keys_of(batch.id)[4], [*map(str, pages)])  # type: ignore[assignment]
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
        states: bytes = self.store.queue.get(self.keys_of(id)[1]) or b""  # type: ignore[assignment]
        numbers: list[int] = []
        while len(numbers) < limit and (after := states.find(b"f", after + 1)) >= 0:
            numbers.append(after)
        if not numbers:
            return {}
        values: list[bytes | None] = self.store.queue.hmget(
            self.keys_of(id)[3], [*map(str, numbers)]
        )  # type: ignore[assignment]
        pairs = zip(numbers, values, strict=True)
        return {number: json.loads(value) for number, value in pairs if value}  # else retried since

    def cancel(self, id: str) -> bool:
        """Cancel the waiting items; the next step cancels queued ones. False if it has ended."""
        return bool(self.run(scripts.CANCEL, id))

    def retry(self, batch: Batch) -> bool:
        """Let the failed items wait again; False if there are none."""
        self._register_webhooks(batch.id, batch.caller, batch.spec)  # the end has removed them
        if not self.run(scripts.RETRY, batch.id, batch.id):
            return False
        ended = batch.total - batch.unfinished - batch.counts["failed"]
        sample = json.dumps([(time.time(), batch.counts["succeeded"], ended)])
        self.store.queue.hset(self.keys_of(batch.id)[0], "samples", sample)
        return True

    def _register_webhooks(self, id: str, caller: str, spec: Spec) -> None:
        for url in spec.webhooks:
            outbox.register(self.store, id, caller, url)

    def run(self, script: str, id: str, *arguments: str | float) -> Any:
        """Run a script of `scripts`."""
        keys = self.keys_of(id)
        return self.store.queue.eval(script, len(keys), *keys, *arguments)

    def touch(self, pipe: redis.client.Pipeline, id: str, seconds: int) -> None:
        """Let all keys of a batch expire in `seconds`, as part of the transaction `pipe`."""
        others = (events.key(self.store, id), self.store.key("webhooks", "of", id))
        for key in (*self.keys_of(id)[:5], *others):
            pipe.expire(key, seconds)

    def keys_of(self, id: str) -> tuple[str, ...]:
        """Keys of the record (hash), states (string), active items (hash: number -> `Active`),
        problems (hash: number -> problem) and pages (hash: number -> page); then `due`, counters.
        """
        names = ("batch", "batch-states", "batch-active", "batch-problems", "batch-pages")
        return *(self.store.key(name, id) for name in names), self.due, counters.key(self.store)

    @property
    def due(self) -> str:
        """Key of a sorted set: batch that has not ended -> time of its next step."""
        return self.store.key("batches")
