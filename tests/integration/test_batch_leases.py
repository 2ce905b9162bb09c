"""Batches in Redis, without an API: what a lease may change, and what happens at the same time."""

import json
from typing import Any

import pytest

from models.tiers import Settings
from worker.queue import counters, events
from worker.queue.batches import leases
from worker.queue.batches.leases import BatchTaken, Lease
from worker.queue.batches.records import Active, Batch, Item, Spec
from worker.queue.batches.store import PAGE, Batches, Packed
from worker.queue.store import Store

pytestmark = pytest.mark.redis

ID = "0" * 32


@pytest.fixture
def batches(store: Store) -> Batches:
    return Batches(store)


def leased(batches: Batches, count: int, **more: str) -> Lease:
    """The lease of a new batch of this many items."""
    spec = Spec("ddim-10", Settings("ddim", 1), seed=5, **more)  # type: ignore[arg-type]
    batches.create("ann", spec, Packed.of(items(count), spec.seed), ID)
    lease = leases.take(batches)
    assert lease is not None
    return lease


def items(count: int, first: int = 0) -> list[Item]:
    return [Item(f"store:in/{n}", f"store:out/{n}", n % 7) for n in range(first, first + count)]


def found(batches: Batches) -> Batch:
    batch = batches.get(ID)
    assert batch is not None
    return batch


def test_items_are_listed_in_parts_of_any_size(batches: Batches) -> None:
    lease, total = leased(batches, 0, source="store:in/"), 0
    for count in (1, PAGE - 1, PAGE, 0, 2 * PAGE + 7, 5):
        lease.extend(found(batches), items(count, total), f"key {count}", count == 5)
        total += count
        batch = found(batches)
        assert (batch.total, batch.after, batch.listed) == (total, f"key {count}", count == 5)
    assert list(batches.items(found(batches), range(total)).values()) == items(total)


def test_a_canceled_batch_is_not_listed_further(batches: Batches) -> None:
    lease = leased(batches, 0, source="store:in/")
    lease.extend(found(batches), items(3), "2", False)
    before = found(batches)
    assert batches.cancel(ID)
    lease.extend(before, items(3, 3), "5", False)
    batch = found(batches)
    assert (batch.total, batch.counts["canceled"], batch.listed) == (3, 3, True)
    assert lease.end()


def test_an_item_that_waits_again_is_canceled_too(batches: Batches) -> None:
    lease = leased(batches, 3)
    assert lease.claim(2, 9) == [0, 1]
    assert batches.cancel(ID)
    lease.settle([(0, "waiting", None), (1, "running", None)])
    batch = found(batches)
    assert (batch.counts["canceled"], batch.counts["running"]) == (2, 1)
    lease.settle([(1, "succeeded", None)] * 2)
    lease.settle([(1, "failed", {"type": "t", "detail": "d"})])
    assert found(batches).counts["succeeded"] == 1 and not batches.failed(ID, -1, 9)
    assert counters.read(batches.store).get(f"{leases.ITEMS}succeeded") == 1
    assert lease.end() and not lease.end()
    assert not batches.cancel(ID)


def test_a_process_that_has_lost_its_lease_changes_nothing(batches: Batches) -> None:
    slow = leased(batches, 3)
    assert leases.take(batches) is None
    slow.due_in(0)
    other = leases.take(batches)
    assert other is not None and other.claim(1, 9) == [0]
    writes = (
        lambda: slow.claim(1, 9), lambda: slow.settle([(0, "failed", None)]),
        lambda: slow.note(0, Active("id")), lambda: slow.due_in(0), slow.renew,
        lambda: slow.extend(found(batches), items(1), "", True),
    )  # fmt: skip
    for write in writes:
        with pytest.raises(BatchTaken):
            write()
    assert (found(batches).counts["queued"], found(batches).counts["waiting"]) == (1, 2)
    assert other.active() == {0: Active()}
    other.settle([(0, "succeeded", None)])
    assert not slow.end()


def test_no_more_items_than_the_window_are_active(batches: Batches) -> None:
    lease = leased(batches, 10)
    assert lease.claim(3, 4) == [0, 1, 2]
    assert lease.claim(3, 4) == [3] and lease.claim(3, 4) == []
    assert lease.note(1, Active("id", True)) and not lease.note(7, Active("id"))
    lease.settle([(1, "succeeded", None), (2, "failed", {"type": "t", "detail": "d"})])
    assert not lease.note(1, Active("id"))
    assert sorted(lease.active()) == [0, 3]
    assert batches.failed(ID, -1, 9) == {2: {"type": "t", "detail": "d"}}
    assert batches.retry(found(batches)) and not batches.failed(ID, -1, 9)
    assert lease.claim(9, 4) == [2, 4]


def test_changes_of_the_counts_are_events(batches: Batches) -> None:
    lease = leased(batches, 2)
    lease.report(found(batches))
    lease.claim(1, 1)
    for _ in range(2):
        lease.report(found(batches))
    entries: Any = batches.store.queue.xrange(events.key(batches.store, ID))
    told = [json.loads(fields[b"data"]) for _, fields in entries]
    assert [(d["waiting"], d["queued"]) for d in told] == [(2, 0), (1, 1)]


def test_a_batch_expires_after_its_last_step(batches: Batches) -> None:
    lease = leased(batches, 2)
    lease.claim(1, 1)
    lease.renew()
    queue = batches.store.queue
    assert all(queue.ttl(key) > 6 * 24 * 3600 for key in queue.keys("*batch-*"))
    queue.delete(batches.keys_of(ID)[0])
    lease.batches.store.queue.zadd(batches.due, {ID: 0})
    assert leases.take(batches) is None and batches.running() == []
