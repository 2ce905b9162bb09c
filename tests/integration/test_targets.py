"""Targets in Redis: when they are due, who is told, and a worker process that writes them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from models.errors import ParameterError
from tests.support.jobs import FAST, decode_of
from tests.support.rig import rig
from tests.support.waiting import until
from worker.attempt import Attempt
from worker.deliveries import Deliveries
from worker.queue import events, outbox
from worker.queue.jobs import Jobs
from worker.queue.object_stores import ObjectStores
from worker.queue.outbox import Outbox
from worker.queue.store import Store
from worker.queue.targets import MAX_TARGETS, Target, seen_by_caller

pytestmark = pytest.mark.redis


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


def begin(jobs: Jobs, data: bytes) -> Attempt:
    """Submit a job and begin an attempt at it, as a worker does."""
    job_id = jobs.submit(decode_of(data), data)[0].id
    jobs.queue.remove(job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    return attempt


def target(caller: str, key: str = "a b.png") -> Target:
    return Target(caller, f"store:out/{key}", "png")


def messages(jobs: Jobs) -> list[tuple[str, str]]:
    """Caller and status of each webhook message."""
    claimed, box = [], Outbox(jobs.store)
    while message := box.claim(60):
        claimed.append((message.caller, json.loads(message.body)["data"]["status"]))
        box.delivered(message)
    return sorted(claimed)


@pytest.mark.parametrize("status", ["written", "failed"])
def test_webhooks_and_events_of_a_caller_wait_for_its_targets(
    jobs: Jobs, small_msh: bytes, status: Literal["written", "failed"]
) -> None:
    attempt = begin(jobs, small_msh)
    for caller in ("ann", "bob"):
        outbox.register(jobs.store, attempt.id, caller, "https://example.com/hook")
    for key in ("a.png", "b.png"):
        jobs.targets.add(attempt.id, target("ann", key))
    assert jobs.targets.claim() is None
    attempt.commit(b"png")
    assert messages(jobs) == [("bob", "succeeded")]
    state = jobs.record(attempt.id)
    assert state is not None
    for _ in range(2):
        claimed = jobs.targets.claim()
        assert claimed is not None and messages(jobs) == []
        assert seen_by_caller(state, jobs.targets.of(attempt.id, "ann")).status == "running"
        jobs.targets.settle(state, replace(claimed[1], status=status, error="no"))
        if status == "failed":
            break
    seen = "succeeded" if status == "written" else "failed"
    assert messages(jobs) == [("ann", seen)]
    entries: Any = jobs.store.queue.xrange(events.key(jobs.store, attempt.id))
    kinds = [fields[b"kind"].decode() for _, fields in entries]
    assert kinds[-2:] == ["completed", {"written": "completed", "failed": "failed"}[status]]
    assert seen_by_caller(state, jobs.targets.of(attempt.id, "bob")).status == "succeeded"


def test_a_withdrawn_target_is_not_written_and_not_recorded(jobs: Jobs, small_msh: bytes) -> None:
    attempt = begin(jobs, small_msh)
    for caller in ("ann", "bob"):
        jobs.targets.add(attempt.id, target(caller))
    attempt.commit(b"png")
    claimed = jobs.targets.claim()
    assert claimed is not None
    state = jobs.record(attempt.id)
    assert state is not None
    jobs.targets.withdraw(attempt.id, claimed[1].caller)
    jobs.targets.postpone(attempt.id, claimed[1], 0)
    jobs.targets.settle(state, claimed[1])
    (left,) = jobs.targets.of(attempt.id)
    assert left.caller != claimed[1].caller
    again = jobs.targets.claim()
    assert again is not None and again[1] == left
    assert jobs.targets.claim() is None


def test_a_canceled_job_forgets_its_targets(jobs: Jobs, small_msh: bytes) -> None:
    job_id = jobs.submit(decode_of(small_msh), small_msh, "ann")[0].id
    jobs.targets.add(job_id, target("eve"))
    jobs.withdraw(job_id, "ann")
    assert jobs.targets.of(job_id) == []


def test_the_targets_of_a_caller_are_limited(jobs: Jobs) -> None:
    for i in range(MAX_TARGETS):
        jobs.targets.add("0" * 32, target("ann", f"{i}.png"))
    jobs.targets.add("0" * 32, target("ann", "0.png"))
    jobs.targets.add("0" * 32, target("bob"))
    with pytest.raises(ParameterError, match=f"{MAX_TARGETS} pending targets"):
        jobs.targets.add("0" * 32, target("ann", "more.png"))


def test_a_target_whose_picture_has_expired_fails_after_some_looks(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.deliveries.NOT_READY_S", 0.0)
    attempt = begin(jobs, small_msh)
    jobs.targets.add(attempt.id, target("ann"))
    attempt.commit(b"png")
    jobs.store.cache.flushall()
    writer = Deliveries(jobs, ObjectStores(), 10**6)
    while writer.deliver_one():
        pass
    (failed,) = jobs.targets.of(attempt.id)
    assert (failed.status, failed.error) == (
        "failed", "the picture has expired; send the bitstream again"
    )  # fmt: skip


def test_a_target_whose_store_is_not_configured_any_more_fails(
    jobs: Jobs, small_msh: bytes
) -> None:
    attempt = begin(jobs, small_msh)
    jobs.targets.add(attempt.id, target("ann"))
    attempt.commit(b"png")
    assert Deliveries(jobs, ObjectStores(), 10**6).deliver_one()
    (failed,) = jobs.targets.of(attempt.id)
    assert failed.error == "there is no object store 'out' that you may use"


@pytest.mark.weights
def test_a_worker_process_writes_targets_beside_its_jobs(tmp_path: Path, small_msh: bytes) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "stores.toml"
    file.write_text(f'[stores.out]\nurl = "file://{tmp_path}/out"\nwrite = true')
    settings = {"AFTERIMAGE_STORES": str(file), "AFTERIMAGE_RESULTS": "store:out/kept"}
    with rig(tmp_path / "rig", forked=True, **settings) as made:
        worker = made.worker().ready()
        job_id = made.submit(small_msh, FAST)
        made.jobs.targets.add(job_id, target("", "sub/a.png"))
        written = tmp_path / "out/sub/a.png"
        until(written.exists, "the target is written")
        assert written.read_bytes() == made.store.picture(job_id)
        made.jobs.targets.add(job_id, target("late", "late.png"))
        until((tmp_path / "out/late.png").exists, "a late target is written")
        until((tmp_path / f"out/kept/{job_id}.png").exists, "the result is written")
        assert worker.terminate() == 0
