"""Attempts and the task, in this process: leases, batches, cancellation, errors of memory."""

import logging
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from rq.timeouts import JobTimeoutException

from models import checkpoint, image, library
from models.codec import recovery
from models.codec.bitstream import Bitstream
from models.diffusion.decoder import Decoder, DiffusionInput
from models.folders import UntrustedFolder
from models.library import Library
from models.tiers import Settings
from tests.support.jobs import FAST, decode_of
from worker import context, tasks
from worker.attempt import Attempt, LeaseLost
from worker.context import WorkerContext
from worker.heartbeat import Heartbeat
from worker.queue import counters, estimates, workers
from worker.queue.jobs import LEASE_S, MAX_ATTEMPTS, Jobs
from worker.queue.quarantine import MAX_CRASHES, QUARANTINED
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S, Store
from worker.spool import Spool

pytestmark = pytest.mark.redis


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


def begin(jobs: Jobs, data: bytes, seed: int = 0) -> Attempt:
    """Submit a job and begin an attempt, as a worker does."""
    job_id = submit(jobs, data, seed)
    jobs.queue.remove(job_id)  # as RQ does
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    return attempt


def submit(jobs: Jobs, data: bytes, seed: int = 0, settings: Settings = FAST) -> str:
    return jobs.submit(decode_of(data, settings, seed), data)[0].id


def state(jobs: Jobs, job_id: str) -> JobState:
    state = jobs.get(job_id)
    assert state is not None
    return state


def expire_lease(jobs: Jobs, attempt: Attempt) -> None:
    """Set the last heartbeat of the attempt's worker to a time before the lease."""
    jobs.store.queue.zadd(jobs.leases, {attempt.id: jobs.now() - LEASE_S - 1})


def test_a_job_has_one_attempt_at_a_time(jobs: Jobs, small_msh: bytes) -> None:
    first = begin(jobs, small_msh)
    assert Attempt.begin(jobs, first.id) is None
    assert Attempt.begin(jobs, "0" * 32) is None


def test_only_one_of_several_concurrent_attempts_begins(jobs: Jobs, small_msh: bytes) -> None:
    job_id = submit(jobs, small_msh)
    begun: list[Attempt | None] = []
    threads = [
        threading.Thread(target=lambda: begun.append(Attempt.begin(jobs, job_id)))
        for _ in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len([a for a in begun if a is not None]) == 1
    assert state(jobs, job_id).attempts == 1


def test_an_attempt_without_its_lease_writes_nothing(jobs: Jobs, small_msh: bytes) -> None:
    stale = begin(jobs, small_msh)
    expire_lease(jobs, stale)
    jobs.reap()
    assert state(jobs, stale.id).status == "queued"
    fresh = Attempt.begin(jobs, stale.id)
    assert fresh is not None and fresh.state.fence > stale.state.fence
    leased = jobs.store.queue.zscore(jobs.leases, stale.id)
    for write in (
        lambda: stale.poll(1), lambda: stale.commit(b"stale"), lambda: stale.fail("stale"),
        stale.cancel, stale.put_back, stale.record_crash,
    ):  # fmt: skip
        with pytest.raises(LeaseLost):
            write()
    time.sleep(0.01)
    stale.renew_lease()
    assert jobs.store.queue.zscore(jobs.leases, stale.id) == leased
    assert jobs.store.picture(stale.id) is None
    fresh.commit(b"fresh")
    assert (state(jobs, stale.id).status, jobs.store.picture(stale.id)) == ("succeeded", b"fresh")
    with pytest.raises(LeaseLost):
        fresh.commit(b"twice")
    assert jobs.store.queue.hget(jobs.key(stale.id), "commits") == b"1"


def keys(jobs: Jobs, pattern: str) -> list[bytes]:
    return list(jobs.store.cache.scan_iter(jobs.store.key(pattern, "*")))


def test_an_attempt_that_pauses_before_it_writes_shows_nothing_after_another_commit(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause is between the check of the lease and the write of the picture."""
    stale = begin(jobs, small_msh)
    put, shown = Store.put_picture, []

    def pausing(store: Store, job_id: str, fence: int, png: bytes) -> None:
        if png == b"stale":
            expire_lease(jobs, stale)
            jobs.reap()
            fresh = Attempt.begin(jobs, stale.id)
            assert fresh is not None
            fresh.commit(b"fresh")
        put(store, job_id, fence, png)
        shown.append(store.picture(job_id))

    monkeypatch.setattr(Store, "put_picture", pausing)
    with pytest.raises(LeaseLost):
        stale.commit(b"stale")
    assert shown == [None, b"fresh"]
    assert jobs.store.picture(stale.id) == b"fresh"
    assert keys(jobs, "drawn") == []


def test_an_attempt_that_pauses_before_it_commits_shows_nothing(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = begin(jobs, small_msh)
    put = Store.put_picture

    def pausing(store: Store, job_id: str, fence: int, png: bytes) -> None:
        put(store, job_id, fence, png)
        if png == b"stale":
            expire_lease(jobs, stale)
            jobs.reap()
            assert Attempt.begin(jobs, stale.id) is not None

    monkeypatch.setattr(Store, "put_picture", pausing)
    with pytest.raises(LeaseLost):
        stale.commit(b"stale")
    assert (state(jobs, stale.id).status, jobs.store.picture(stale.id)) == ("running", None)


@pytest.mark.parametrize("reader", ["of the picture", "of the record"])
def test_a_picture_is_seen_although_its_worker_died_before_it_published_it(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    attempt = begin(jobs, small_msh)

    def dying(*_: object) -> bool:
        raise redis.ConnectionError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", dying)
        attempt.commit(b"picture")
    assert keys(jobs, "picture") == []
    if reader == "of the record":
        assert state(jobs, attempt.id).status == "succeeded"
    assert jobs.store.picture(attempt.id) == b"picture"
    assert keys(jobs, "drawn") == []


def test_a_picture_that_is_published_very_late_replaces_no_later_one(
    jobs: Jobs, small_msh: bytes
) -> None:
    """Both attempts committed, the second one after the queue had lost the record."""
    first = begin(jobs, small_msh)
    jobs.store.put_picture(first.id, first.state.fence, b"first")
    jobs.store.queue.flushall()
    time.sleep(0.01)  # fences are milliseconds
    second = begin(jobs, small_msh)
    second.commit(b"second")
    assert jobs.store.publish(first.id, first.state.fence)
    assert jobs.store.picture(first.id) == b"second"
    assert keys(jobs, "drawn") == []


def test_a_picture_that_was_evicted_is_stored_again_or_has_expired(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(jobs, small_msh)
    put, calls = Store.put_picture, []

    def evicted(store: Store, *args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            put(store, *args)

    monkeypatch.setattr(Store, "put_picture", evicted)
    attempt.commit(b"picture")
    assert (len(calls), jobs.store.picture(attempt.id)) == (2, b"picture")
    jobs.store.cache.flushall()
    assert (state(jobs, attempt.id).status, jobs.store.picture(attempt.id)) == ("expired", None)
    again = begin(jobs, small_msh)
    again.commit(b"again")
    assert jobs.store.picture(again.id) == b"again"


def test_an_attempt_may_commit_after_its_lease_until_another_begins(
    jobs: Jobs, small_msh: bytes
) -> None:
    """Its worker did not crash after all: the crash is not counted."""
    late = begin(jobs, small_msh)
    expire_lease(jobs, late)
    jobs.reap()
    assert jobs.quarantine.count(late.state.decode.digest) == 1
    late.commit(b"late")
    assert state(jobs, late.id).status == "succeeded"
    assert jobs.queue.job_ids == []
    assert jobs.quarantine.count(late.state.decode.digest) == 0


def test_a_new_submission_has_a_higher_fence_than_former_attempts(
    jobs: Jobs, small_msh: bytes
) -> None:
    old = begin(jobs, small_msh)
    old.fail("broken")
    new = begin(jobs, small_msh)
    assert new.state.fence > old.state.fence
    with pytest.raises(LeaseLost):
        old.commit(b"old")


def test_crashes_are_counted_per_bitstream_over_all_its_jobs(jobs: Jobs, small_msh: bytes) -> None:
    for seed in range(MAX_CRASHES):
        attempt = begin(jobs, small_msh, seed)
        expire_lease(jobs, attempt)
        jobs.reap()
    assert (state(jobs, attempt.id).status, state(jobs, attempt.id).error) == (
        "failed", QUARANTINED
    )  # fmt: skip
    key = jobs.store.key("deaths", attempt.state.decode.digest)
    assert 0 < jobs.store.queue.ttl(key) <= 24 * 3600


def test_the_log_has_the_reason_of_every_job_without_a_picture(
    jobs: Jobs, small_msh: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failed = begin(jobs, small_msh)
    failed.fail("timed out after 3600 s")
    canceled = begin(jobs, small_msh, seed=1)
    jobs.withdraw(canceled.id, "")
    assert canceled.cancel()
    for seed in range(2, 2 + MAX_CRASHES):
        crashed = begin(jobs, small_msh, seed)
        crashed.record_crash()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"job {failed.id} failed: timed out after 3600 s"),
        ("INFO", f"job {canceled.id} canceled"),
        ("WARNING", f"job {crashed.id} failed: {QUARANTINED}"),
    ]


def test_jobs_of_one_batch_have_the_same_eta(jobs: Jobs, small_msh: bytes) -> None:
    ids = [submit(jobs, small_msh, seed) for seed in range(3)]
    workers.mark_alive(jobs)
    estimates.record_duration(jobs, 2.0, decode_of(small_msh, FAST).work)  # 2 s each
    for job_id, owner in zip(ids, ("batch", "batch", "other"), strict=True):
        jobs.queue.remove(job_id)  # as RQ does
        assert Attempt.begin(jobs, job_id, owner) is not None
    etas = [estimates.eta_s(jobs, state(jobs, job_id)) for job_id in ids]
    assert etas == pytest.approx([4.0, 4.0, 2.0])
    assert estimates.backlog_s(jobs) == pytest.approx(4.0)  # one worker is alive


def test_after_a_suspension_other_workers_get_time_for_a_heartbeat(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    attempt = begin(jobs, small_msh)
    expire_lease(jobs, attempt)
    heartbeat = Heartbeat(jobs, Spool(tmp_path), tmp_path / "alive")
    heartbeat._reap_from, heartbeat._last_beat = 0.0, jobs.now() - LEASE_S - 1
    heartbeat._beat()
    assert state(jobs, attempt.id).status == "running"
    heartbeat._reap_from = 0.0
    heartbeat._beat()
    assert state(jobs, attempt.id).status == "queued"


def test_a_worker_that_loses_a_batch_is_counted_once(jobs: Jobs, small_msh: bytes) -> None:
    for seed, owner in enumerate(("batch", "batch", "other")):
        job_id = submit(jobs, small_msh, seed)
        jobs.queue.remove(job_id)
        attempt = Attempt.begin(jobs, job_id, owner)
        assert attempt is not None
        expire_lease(jobs, attempt)
    jobs.reap()
    assert counters.read(jobs.store).get(counters.LEASES_LOST) == 2


def test_a_worker_that_hangs_sends_no_heartbeat(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    """Its liveness file is gone as well, so that a health check restarts the process."""
    attempt = begin(jobs, small_msh)
    expire_lease(jobs, attempt)
    heartbeat = Heartbeat(jobs, Spool(tmp_path), tmp_path / "alive")
    heartbeat.attempts = [attempt]
    heartbeat.stopped.set()  # one turn
    heartbeat.deadline = time.monotonic()
    heartbeat.run()
    assert not heartbeat.file.exists()
    jobs.reap()
    assert state(jobs, attempt.id).status == "queued"
    heartbeat.deadline = time.monotonic() + 60
    again = Attempt.begin(jobs, attempt.id)
    assert again is not None
    expire_lease(jobs, again)
    heartbeat.attempts = [again]
    heartbeat.run()
    jobs.reap()
    assert state(jobs, attempt.id).status == "running"


def test_jobs_without_subscribers_do_not_count_in_etas(jobs: Jobs, small_msh: bytes) -> None:
    first, second = (submit(jobs, small_msh, seed) for seed in range(2))
    estimates.record_duration(jobs, 2.0, decode_of(small_msh, FAST).work)
    assert estimates.eta_s(jobs, state(jobs, second)) == pytest.approx(4.0)
    ended = jobs.now() - 1
    jobs.store.queue.zadd(jobs.subscribers(first), {"": ended})
    assert estimates.eta_s(jobs, state(jobs, second)) == pytest.approx(2.0)
    assert estimates.backlog_s(jobs) == pytest.approx(2.0)


def test_the_eta_of_the_submission_is_compared_with_the_time_that_it_took(
    jobs: Jobs, small_msh: bytes
) -> None:
    jobs.submit(decode_of(small_msh, FAST), small_msh, eta_s=1000.0)
    attempt = begin(jobs, small_msh)
    attempt.commit(b"png")
    attempt.record_duration(1.0)
    assert counters.read(jobs.store).get("eta_ratio:0.1") == 1


def test_subscriptions_end_by_the_servers_clock(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(jobs, small_msh)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7 * 24 * 3600)
    assert jobs.has_subscribers(attempt.id)
    assert attempt.poll().subscribed


def test_a_batch_does_not_contain_a_job_twice(jobs: Jobs, small_msh: bytes) -> None:
    """Another worker may queue it again while this one is about to begin it."""
    job_id = submit(jobs, small_msh)
    assert jobs.claim_similar(state(jobs, job_id), 4) == []
    assert jobs.queue.job_ids == [job_id]


def test_durations_of_long_dead_workers_are_removed(jobs: Jobs) -> None:
    for number in range(estimates.MAX_DEAD_WORKERS + 5):
        estimates.record_duration(jobs, 1.0, 1.0, f"worker-{-number}")
    stored = jobs.store.queue.hkeys(jobs.store.key("sums"))
    last = (f"worker-{-number}".encode() for number in range(4, estimates.MAX_DEAD_WORKERS + 5))
    assert set(stored) == {*last}  # by time, not by name


def test_a_success_resets_the_crashes_of_a_bitstream(jobs: Jobs, small_msh: bytes) -> None:
    job_id = submit(jobs, small_msh)
    for end in (Attempt.record_crash, lambda attempt: attempt.commit(b"png")):
        assert jobs.quarantine.count(decode_of(small_msh, FAST).digest) == (
            end is not Attempt.record_crash
        )
        attempt = Attempt.begin(jobs, job_id)
        assert attempt is not None
        end(attempt)
    assert jobs.quarantine.count(decode_of(small_msh, FAST).digest) == 0


def test_a_job_fails_after_its_workers_lost_too_many_leases(jobs: Jobs, small_msh: bytes) -> None:
    job_id = submit(jobs, small_msh)
    for n in range(MAX_ATTEMPTS):
        assert state(jobs, job_id).status == "queued", n
        attempt = Attempt.begin(jobs, job_id)
        assert attempt is not None
        expire_lease(jobs, attempt)
        jobs.reap()
        jobs.quarantine.forgive(attempt.state)
    assert (state(jobs, job_id).status, state(jobs, job_id).attempts) == ("failed", MAX_ATTEMPTS)


def test_an_attempt_ended_by_a_shutdown_is_not_counted(
    jobs: Jobs, small_msh: bytes, small_compressai: bytes
) -> None:
    attempt = begin(jobs, small_msh)
    behind = submit(jobs, small_compressai)
    attempt.put_back()
    assert jobs.queue.job_ids == [attempt.id, behind]
    assert (state(jobs, attempt.id).attempts, state(jobs, attempt.id).status) == (0, "queued")


def test_a_spooled_picture_is_committed_by_another_process(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    spool = Spool(tmp_path)
    gone, late = begin(jobs, small_msh), begin(jobs, small_msh, 1)
    png = image.write(np.zeros((100, 150, 3), np.uint8), "png")
    spool.save(gone, png)
    spool.save(late, png)
    late.fail("another end")
    spool.commit_all(jobs, exclude={gone.id})
    assert [file.name[:32] for file in tmp_path.glob("*.png")] == [gone.id]
    spool.commit_all(jobs)
    assert jobs.store.picture(gone.id) == png
    assert state(jobs, gone.id).status == "succeeded"
    assert (state(jobs, late.id).status, jobs.store.picture(late.id)) == ("failed", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "forgery", ["text", "other size", "other picture", "link", "pipe", "writable", "huge"]
)
def test_a_forged_file_in_the_spool_is_deleted_and_not_committed(
    jobs: Jobs, small_msh: bytes, tmp_path: Path, forgery: str
) -> None:
    """The folder is this user's, but the file is not what the worker wrote."""
    attempt = begin(jobs, small_msh)
    png = image.write(np.zeros((100, 150, 3), np.uint8), "png")
    spool = Spool(tmp_path / "spool")
    file = spool.save(attempt, png)
    if forgery == "text":
        file.write_bytes(b"<script>")
    elif forgery == "other size":
        file.write_bytes(image.write(np.zeros((150, 100, 3), np.uint8), "png"))
    elif forgery == "other picture":
        file.write_bytes(image.write(np.ones((100, 150, 3), np.uint8), "png"))
    elif forgery == "huge":
        file.write_bytes(png + bytes(2**21))
    elif forgery == "writable":
        file.chmod(0o666)
    else:
        file.unlink()
        secret = tmp_path / "secret.png"
        secret.write_bytes(png)
        file.symlink_to(secret) if forgery == "link" else os.mkfifo(file)
    if forgery == "writable":  # others could have changed it: the whole spool is refused
        with pytest.raises(UntrustedFolder, match="every user may write"):
            spool.commit_all(jobs)
    else:
        spool.commit_all(jobs)
        assert not file.is_symlink() and not file.exists()
    assert state(jobs, attempt.id).status == "running"
    assert jobs.store.picture(attempt.id) is None


def test_spooled_pictures_older_than_any_record_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("old", RECORD_TTL_S + 60), ("new", 60)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / f"{'0' * 32}.1.png"
        file.write_bytes(b"spooled")
        os.utime(file, (time.time() - age_s,) * 2)
    Spool.remove_expired(tmp_path)
    assert [file.parent.name for file in tmp_path.rglob("*.png")] == ["new"]


@pytest.fixture(scope="module")
def loaded(tiny_decoder: Decoder) -> Library:
    """The shipped codecs, and a tiny diffusion decoder with the ids of the shipped ones."""
    entries = checkpoint.decoder_entries().items()
    decoders = {steps: Decoder(e.weights_id, tiny_decoder.net) for steps, e in entries}
    return replace(library.load(with_decoders=False), decoders=decoders)


@pytest.fixture
def worker(
    jobs: Jobs, loaded: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> WorkerContext:
    """The context that makes this process a worker."""
    spool = Spool(tmp_path)
    heartbeat = Heartbeat(jobs, spool, tmp_path)
    worker = WorkerContext(jobs, loaded, heartbeat, spool, max_pixels=10**6)
    monkeypatch.setattr(context, "_current", worker)
    return worker


def pictures(jobs: Jobs, ids: list[str]) -> list[image.Pixels]:
    read = []
    for job_id in ids:
        assert state(jobs, job_id).status == "succeeded", state(jobs, job_id).error
        read.append(image.read(jobs.store.picture(job_id) or b"", 10**6))
    return read


@pytest.mark.weights
def test_a_batch_gives_the_same_pictures_as_single_jobs(
    worker: WorkerContext,
    jobs: Jobs,
    small_msh: bytes,
    small_compressai: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def submitted() -> list[str]:
        ids = [
            submit(jobs, small_msh, 0),
            submit(jobs, small_msh, 1),
            submit(jobs, small_compressai),
        ]
        other = submit(jobs, small_msh, 0, Settings("ddim", 3))
        assert jobs.queue.job_ids == [*ids, other]
        jobs.queue.remove(ids[0])  # as RQ does
        return [*ids, other]

    worker.batch = 4
    *ids, other = submitted()
    tasks.enhance(ids[0])
    together = pictures(jobs, ids)
    assert jobs.queue.job_ids == [other]  # its settings differ
    assert [jobs.store.queue.hget(jobs.key(i), "commits") for i in ids] == [b"1"] * 3

    jobs.store.queue.flushall()
    jobs.store.cache.flushall()
    worker.batch = 1
    submitted()
    for job_id in ids:
        tasks.enhance(job_id)
    for a, b in zip(together, pictures(jobs, ids), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.weights
def test_a_batch_on_a_cpu_fits_into_one_window(
    worker: WorkerContext, jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.batch = 4
    monkeypatch.setattr(tasks, "WINDOW", 2 * 12 * 8 + 1)  # 150×100 pixels have 12×8 positions
    ids = [submit(jobs, small_msh, seed) for seed in range(4)]
    jobs.queue.remove(ids[0])
    tasks.enhance(ids[0])
    assert jobs.queue.job_ids == ids[2:]
    assert len(pictures(jobs, ids[:2])) == 2


@pytest.mark.weights
def test_a_job_of_a_batch_is_canceled_at_once_unless_resubscribed(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    small_msh: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker.batch = 3
    settings, forward = Settings("ddim", 8), loaded.decoders[0].net.denoiser.forward
    first, second, third = (submit(jobs, small_msh, seed, settings) for seed in range(3))
    jobs.queue.remove(first)  # as RQ does
    seen: list[tuple[str, ...]] = []

    def withdrawing(*args: Any) -> torch.Tensor:
        seen.append(tuple(state(jobs, name).status for name in (first, second, third)))
        if len(seen) == 3:
            jobs.withdraw(first, "")
            jobs.withdraw(second, "")
        if len(seen) == 6:
            jobs.subscribe(first, "", 60)
        return forward(*args)

    monkeypatch.setattr(loaded.decoders[0].net.denoiser, "forward", withdrawing)
    tasks.enhance(first)
    worker.run_deferred()
    assert seen[2] == ("running", "running", "running")
    assert seen[4] == ("running", "canceled", "running")
    assert len(pictures(jobs, [first, third])) == 2
    assert (state(jobs, first).attempts, len(seen)) == (1, 8)


@pytest.mark.weights
@pytest.mark.parametrize("disk", ["good", "full"])
def test_a_picture_waits_for_its_store_without_a_time_limit(
    worker: WorkerContext, jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """Timeouts are for drawing, and the wait is not recorded as its duration."""
    put, alarms = Store.put_picture, []
    draw, limits = tasks._draw, []

    def drawing(*args: Any) -> None:
        limits.append(worker.heartbeat.deadline - time.monotonic())
        draw(*args)

    def full(*_: Any) -> Path:
        raise OSError("no space left on device")

    def failing(store: Store, *args: Any) -> None:
        alarms.append(signal.alarm(0))
        assert worker.heartbeat.deadline == math.inf
        if len(alarms) < 3:
            raise redis.ConnectionError("injected")
        put(store, *args)

    monkeypatch.setattr(Store, "put_picture", failing)
    monkeypatch.setattr(tasks, "_draw", drawing)
    if disk == "full":
        monkeypatch.setattr(Spool, "save", full)
    job_id = submit(jobs, small_msh)
    signal.alarm(600)
    tasks.enhance(job_id)
    worker.run_deferred()
    assert alarms == [0, 0, 0]
    assert 0 < limits[0] - jobs.timeout_s <= tasks.LATE_S
    assert state(jobs, job_id).status == "succeeded"
    assert estimates.cost_model(jobs) is None
    assert not list(worker.spool.folder.glob("*.png"))


@pytest.mark.weights
def test_a_damaged_bitstream_fails_alone_in_its_batch(
    worker: WorkerContext,
    jobs: Jobs,
    small_msh: bytes,
    small_compressai: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = bytearray(small_compressai)
    bad[-100] ^= 255
    worker.batch = 4
    good, broken = submit(jobs, small_msh), submit(jobs, bytes(bad))
    jobs.queue.remove(good)
    tasks.enhance(good)
    assert [state(jobs, i).status for i in (good, broken)] == ["succeeded", "failed"]

    good, odd = submit(jobs, small_msh, 1), submit(jobs, small_compressai, 1)
    jobs.queue.remove(good)
    diffusion_input = Library.diffusion_input

    def failing(library: Library, b: Bitstream, settings: Settings, seed: int) -> DiffusionInput:
        if b.format == "compressai":
            raise RuntimeError("injected")
        return diffusion_input(library, b, settings, seed)

    monkeypatch.setattr(Library, "diffusion_input", failing)
    tasks.enhance(good)
    assert [state(jobs, i).status for i in (good, odd)] == ["succeeded", "failed"]
    assert state(jobs, odd).error == "internal error"


@pytest.mark.weights
def test_a_job_whose_recovery_process_died_fails_and_may_be_sent_again(
    worker: WorkerContext, jobs: Jobs, small_compressai: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: Any) -> DiffusionInput:
        raise recovery._unavailable("ended before it replied")

    job_id = submit(jobs, small_compressai)
    jobs.queue.remove(job_id)
    with monkeypatch.context() as patch:
        patch.setattr(Library, "diffusion_input", dying)
        tasks.enhance(job_id)
    ended = state(jobs, job_id)
    assert ended.status == "failed"
    assert "ended before it replied; try again later" in ended.error
    submit(jobs, small_compressai)
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])


def limit_memory(monkeypatch: pytest.MonkeyPatch, loaded: Library, pixels: int) -> list[int]:
    """Make the denoiser run out of memory above `pixels`; returns the sizes of its inputs."""
    denoiser, sizes = loaded.decoders[0].net.denoiser, []
    forward = denoiser.forward

    def limited(x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(x_t.shape[2] * x_t.shape[3])
        if sizes[-1] > pixels:
            raise torch.OutOfMemoryError("injected")
        return forward(x_t, *rest)

    monkeypatch.setattr(denoiser, "forward", limited)
    return sizes


def fail_with(monkeypatch: pytest.MonkeyPatch, loaded: Library, error: Exception) -> None:
    """Make the denoiser raise `error`."""

    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(loaded.decoders[0].net.denoiser, "forward", fail)


@pytest.fixture(scope="module")
def large(loaded: Library, photo: image.Pixels) -> bytes:
    from models.codec import bitstream, codec

    crop = codec.to_tensor(photo[:512, :512].copy())
    return bitstream.serialize(loaded.find(2, "mse").encode(crop, "msh", "exact"))


@pytest.mark.weights
def test_out_of_memory_is_retried_with_smaller_tiles(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    large: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.drawing.WINDOW", 1024)
    monkeypatch.setattr("worker.drawing.MIN_WINDOW", 128)
    job_id = submit(jobs, large)
    tasks.enhance(job_id)
    (whole,) = pictures(jobs, [job_id])
    jobs.store.cache.flushall()
    sizes = limit_memory(monkeypatch, loaded, 400 * 400)
    submit(jobs, large)
    tasks.enhance(job_id)
    assert sizes[0] == 512 * 512 and max(sizes[-4:]) <= 400 * 400
    (tiled,) = pictures(jobs, [job_id])
    assert np.abs(whole.astype(int) - tiled).max() <= 1
    assert not worker.stopping


@pytest.mark.weights
def test_out_of_memory_with_the_smallest_tiles_stops_the_worker_and_keeps_the_job(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    large: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = limit_memory(monkeypatch, loaded, 0)
    job_id = submit(jobs, large)
    jobs.queue.remove(job_id)
    tasks.enhance(job_id)
    worker.run_deferred()
    assert worker.stopping
    assert len(sizes) > 2
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])
    assert jobs.quarantine.count(decode_of(large, FAST).digest) == 1


@pytest.mark.weights
def test_a_lost_device_stops_the_worker_and_keeps_the_job(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    small_msh: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    fail_with(monkeypatch, loaded, lost)
    job_id = submit(jobs, small_msh)
    jobs.queue.remove(job_id)
    tasks.enhance(job_id)
    worker.run_deferred()
    assert worker.stopping
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])


@pytest.mark.weights
def test_a_job_that_times_out_fails_and_the_worker_continues(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    small_msh: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(monkeypatch, loaded, JobTimeoutException("as RQ's timer does"))
    job_id = submit(jobs, small_msh)
    tasks.enhance(job_id)
    ended = state(jobs, job_id)
    assert (ended.status, ended.error) == ("failed", "timed out after 3600 s")
    assert not worker.stopping


def test_a_job_resubscribed_during_its_cancellation_is_queued_again(
    jobs: Jobs, small_msh: bytes
) -> None:
    job_id = submit(jobs, small_msh)
    jobs.queue.remove(job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    jobs.withdraw(job_id, "")
    jobs.subscribe(job_id, "other", 60)
    attempt.cancel()
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])
    jobs.queue.remove(job_id)
    jobs.cancel_unless_subscribed(job_id)  # of a job that no attempt has begun
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])


@pytest.mark.weights
def test_a_canceled_job_keeps_its_last_preview(
    worker: WorkerContext,
    jobs: Jobs,
    loaded: Library,
    small_msh: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = submit(jobs, small_msh, 0, Settings("ddim", 50))
    calls: list[int] = []
    forward = loaded.decoders[0].net.denoiser.forward

    def withdrawing(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            jobs.withdraw(job_id, "")
        return forward(*args)

    monkeypatch.setattr(loaded.decoders[0].net.denoiser, "forward", withdrawing)
    tasks.enhance(job_id)
    worker.run_deferred()
    assert (state(jobs, job_id).status, len(calls)) == ("canceled", 5)
    preview = jobs.store.preview(job_id)
    assert preview is not None
    assert image.read(preview, 10**6).shape == (100, 150, 3)


def test_a_lost_reply_of_redis_loses_no_job(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction succeeds, but the connection breaks before its reply."""
    job_id = submit(jobs, small_msh)
    change, calls = Jobs.change, []

    def losing_reply(self: Jobs, *args: Any) -> bool:
        done = change(self, *args)
        calls.append(done)
        return done and len(calls) > 1

    monkeypatch.setattr(Jobs, "change", losing_reply)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    assert attempt.poll(1).subscribed
    assert state(jobs, job_id).attempts == 1
    assert Attempt.begin(jobs, job_id) is None
