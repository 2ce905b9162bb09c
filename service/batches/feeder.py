"""Goes on with a batch under a lease: lists sources, begins items, records what has ended."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

from models.errors import AfterimageError
from service import admission
from service.auth import Caller
from service.batches import listing, progress
from service.batches.items import Beginner, Change, priority_of, problem
from service.keys import SCOPES
from service.problems import Unauthorized
from service.services import Services
from worker.queue import estimates, workers
from worker.queue.batches.leases import Lease
from worker.queue.batches.records import Active, Batch
from worker.queue.references import StoreAway

ITEMS_AT_ONCE = 8
"""Items of a batch that are begun at a time; most of the time is spent waiting for stores."""
SLICE = 32
"""Largest number of items that are claimed and not yet submitted."""
WINDOW, WINDOW_PER_WORKER, MAX_WINDOW = 64, 16, 512
"""A batch has at most `WINDOW + WINDOW_PER_WORKER × live workers` items queued or running, and
never more than `MAX_WINDOW`. This keeps the workers supplied."""
BACKLOG_SHARE, FEW = 0.5, 8
"""If the predicted wait exceeds `BACKLOG_SHARE × max_backlog_s`, at most `FEW` items are active.
The rest of the backlog is left to other requests, while the batch still gets its share."""
REFUSED = 1000
"""Items that fail together, because their caller has no key any more."""
STEP_S = 1.0
"""Interval between two looks at a batch."""
_THREADS = anyio.CapacityLimiter(16)
"""Threads that use Redis and list stores; separate, so that they do not block requests."""

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Feeder:
    """Goes on with one batch."""

    def __init__(self, services: Services, lease: Lease) -> None:
        self.services, self.lease, self.batches = services, lease, lease.batches
        self._beginning: dict[int, asyncio.Task[None]] = {}
        self._free = asyncio.Semaphore(ITEMS_AT_ONCE)
        self._full_until = 0.0
        """Monotonic time until which no items are claimed: the caller's quota was used up."""

    async def run(self) -> float:
        """Take steps while items are being begun; returns the seconds until the next step."""
        try:
            while True:
                pause_s = await self._step()
                if not self._beginning:
                    return pause_s
                await asyncio.wait(self._beginning.values(), timeout=STEP_S)
                for number in [n for n, task in self._beginning.items() if task.done()]:
                    self._beginning.pop(number).result()
        finally:
            for task in self._beginning.values():
                task.cancel()
            await asyncio.gather(*self._beginning.values(), return_exceptions=True)

    async def _step(self) -> float:
        """Take a step; returns the seconds until the next one."""
        before = await in_thread(self.batches.get, self.lease.id)
        if before is None:
            return STEP_S
        pause_s = STEP_S if before.listed else await self._list(before)
        try:
            caller = self._caller(before)
        except Unauthorized as e:
            pause_s = await self._refuse(before, e)
        else:
            await self._begin_and_settle(before, caller)
        after = await in_thread(self.batches.get, self.lease.id)
        if after is not None:
            await in_thread(self.lease.report, after)
            await in_thread(self.lease.end)
        return pause_s

    def _caller(self, batch: Batch) -> Caller:
        """The caller, as its API key is now. Raises `Unauthorized`."""
        if self.services.keys is None:
            return Caller(batch.caller, frozenset(SCOPES))
        return self.services.keys.named(batch.caller, "decode")

    async def _list(self, batch: Batch) -> float:
        """List the next sources; returns the seconds until the listing may go on."""
        objects = self.services.objects
        try:
            part = await in_thread(listing.read, objects, batch)
        except StoreAway as e:
            log.warning("batch %s: its sources cannot be listed yet: %s", batch.id, e)
            return STEP_S
        except AfterimageError as e:
            await in_thread(self.lease.fail_listing, problem(e))
            return 0.0
        await in_thread(self.lease.extend, batch, *part)
        return 0.0

    async def _refuse(self, batch: Batch, e: Unauthorized) -> float:
        """Let the items fail that need the caller's key; returns the seconds until the others."""
        active = await in_thread(self.lease.active)
        claimed = await in_thread(self.lease.claim, REFUSED, REFUSED)
        active |= dict.fromkeys(claimed, Active())
        await self._settle(batch, active, [(number, "failed", problem(e)) for number in active])
        return 0.0 if claimed else STEP_S

    async def _begin_and_settle(self, batch: Batch, caller: Caller) -> None:
        active = await in_thread(self.lease.active)
        if batch.canceled:
            active = await self._withdraw(batch, caller, active)
        items = await in_thread(self.batches.items, batch, active)
        seen = await in_thread(progress.look, self.services, batch, caller.name, items, active)
        await self._settle(batch, active, seen.changes)
        due = {n: active[n] for n in seen.to_submit if active[n].at <= time.time()}
        if not batch.canceled:
            claimed = await in_thread(self._claim, batch, caller)
            due |= dict.fromkeys(claimed, Active())
        await self._begin(batch, caller, due)

    async def _withdraw(
        self, batch: Batch, caller: Caller, active: Mapping[int, Active]
    ) -> dict[int, Active]:
        """Cancel the active items whose drawing has not begun; returns the others."""
        begun = {n: known for n, known in active.items() if n not in self._beginning}
        items = await in_thread(self.batches.items, batch, begun)
        changes = await in_thread(progress.withdraw, self.services, batch, caller, items, begun)
        await self._settle(batch, active, changes)
        canceled = {number for number, _, _ in changes}
        return {number: known for number, known in active.items() if number not in canceled}

    async def _settle(
        self, batch: Batch, active: Mapping[int, Active], changes: list[Change]
    ) -> None:
        await in_thread(self.lease.settle, changes)
        await in_thread(progress.unsubscribe, self.services, batch, active, changes)

    def _claim(self, batch: Batch, caller: Caller) -> list[int]:
        """Claim waiting items within the limits of the window, the quota and the queue."""
        services, jobs = self.services, self.services.jobs
        full = time.monotonic() < self._full_until
        if full or not batch.counts["waiting"] or services.store.fullness() >= admission.FULL:
            return []
        room = SLICE - len(self._beginning)
        free = services.quotas.free_jobs(caller)
        window = min(WINDOW + WINDOW_PER_WORKER * len(workers.live(jobs)), MAX_WINDOW)
        backlog_s = estimates.backlog_s(jobs, caller.name, priority_of(batch, caller))
        if backlog_s > BACKLOG_SHARE * services.settings.max_backlog_s:
            window = min(window, FEW)
        if free is not None:
            room = min(room, max(free - len(self._beginning), 0))
        return self.lease.claim(room, window)

    async def _begin(self, batch: Batch, caller: Caller, due: Mapping[int, Active]) -> None:
        """Start to begin items; `run` waits for them."""
        new = [number for number in due if number not in self._beginning]
        items = await in_thread(self.batches.items, batch, new)
        beginner = Beginner(self.services, self.lease, batch, caller)

        async def begin(number: int) -> None:
            async with self._free:
                change = await beginner.begin(number, items[number], due[number])
            if change is not None:
                await in_thread(self.lease.settle, [change])
                if change[1] == "waiting":
                    self._full_until = time.monotonic() + STEP_S

        for number in new:
            self._beginning[number] = asyncio.create_task(begin(number))


async def in_thread(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Run a function of Redis or of a store."""
    return await anyio.to_thread.run_sync(function, *arguments, limiter=_THREADS)
