"""A worker's hold on a job, in this process: who may write, and what short memory does."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from rq.timeouts import JobTimeoutException

from models import image, library
from models.codec.bitstream import Bitstream
from models.diffusion.decoder import DiffusionInput
from models.library import Library
from models.tiers import Settings
from tests.support.jobs import FAST, decode_of
from worker import tasks
from worker.attempt import Attempt, LeaseLost
from worker.heartbeat import Keeper
from worker.queue import counters, estimates
from worker.queue.jobs import DEATHS, LEASE_S, MAX_ATTEMPTS, QUARANTINED, Jobs
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S, Store
from worker.spool import Spool
from worker.tasks import Context

pytestmark = pytest.mark.redis


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


def begin(jobs: Jobs, data: bytes, seed: int = 0) -> Attempt:
    job_id = submit(jobs, data, seed)
    jobs.queue.remove(job_id)  # as a worker takes it
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    return attempt


def submit(jobs: Jobs, data: bytes, seed: int = 0, settings: Settings = FAST) -> str:
    return jobs.submit(decode_of(data, settings, seed), data)[0].id


def state(jobs: Jobs, job_id: str) -> JobState:
    found = jobs.get(job_id)
    assert found is not None
    return found


def silence(jobs: Jobs, attempt: Attempt) -> None:
    """Its worker was last heard of too long ago."""
    jobs.store.queue.zadd(jobs.leases, {attempt.id: jobs.now() - LEASE_S - 1})


def test_a_job_is_begun_once(jobs: Jobs, small_msh: bytes) -> None:
    first = begin(jobs, small_msh)
    assert Attempt.begin(jobs, first.id) is None
    assert Attempt.begin(jobs, "0" * 32) is None


def test_two_that_take_a_job_at_once_are_one_attempt(jobs: Jobs, small_msh: bytes) -> None:
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


def test_who_lost_the_lease_writes_nothing(jobs: Jobs, small_msh: bytes) -> None:
    stale = begin(jobs, small_msh)
    silence(jobs, stale)
    jobs.reap()
    assert state(jobs, stale.id).status == "queued"
    fresh = Attempt.begin(jobs, stale.id)
    assert fresh is not None and fresh.state.fence > stale.state.fence
    leased = jobs.store.queue.zscore(jobs.leases, stale.id)
    for write in (
        lambda: stale.look(1), lambda: stale.commit(b"stale"), lambda: stale.fail("stale"),
        stale.stop, stale.put_back, stale.blame,
    ):  # fmt: skip
        with pytest.raises(LeaseLost):
            write()
    time.sleep(0.01)
    stale.beat()
    assert jobs.store.queue.zscore(jobs.leases, stale.id) == leased
    assert jobs.store.picture(stale.id) is None
    fresh.commit(b"fresh")
    assert (state(jobs, stale.id).status, jobs.store.picture(stale.id)) == ("succeeded", b"fresh")
    with pytest.raises(LeaseLost):
        fresh.commit(b"twice")
    assert jobs.store.queue.hget(jobs.key(stale.id), "commits") == b"1"


def test_who_was_cut_off_may_still_commit_before_another_begins(
    jobs: Jobs, small_msh: bytes
) -> None:
    """And was not dead: nothing is held against the bitstream."""
    late = begin(jobs, small_msh)
    silence(jobs, late)
    jobs.reap()
    assert jobs.crash_count(late.state.decode.digest) == 1
    late.commit(b"late")
    assert state(jobs, late.id).status == "succeeded"
    assert jobs.queue.job_ids == []
    assert jobs.crash_count(late.state.decode.digest) == 0


def test_a_new_submission_outranks_every_attempt_at_the_old_one(
    jobs: Jobs, small_msh: bytes
) -> None:
    old = begin(jobs, small_msh)
    old.fail("broken")
    new = begin(jobs, small_msh)
    assert new.state.fence > old.state.fence
    with pytest.raises(LeaseLost):
        old.commit(b"old")


def test_deaths_count_against_the_bitstream_whatever_is_asked_of_it(
    jobs: Jobs, small_msh: bytes
) -> None:
    for seed in range(DEATHS):
        attempt = begin(jobs, small_msh, seed)
        silence(jobs, attempt)
        jobs.reap()
    assert (state(jobs, attempt.id).status, state(jobs, attempt.id).error) == (
        "failed", QUARANTINED
    )  # fmt: skip
    key = jobs.store.key("deaths", attempt.state.decode.digest)
    assert 0 < jobs.store.queue.ttl(key) <= 24 * 3600


def test_the_log_says_why_a_job_ended_without_a_picture(
    jobs: Jobs, small_msh: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failed = begin(jobs, small_msh)
    failed.fail("it took longer than 3600 s")
    canceled = begin(jobs, small_msh, seed=1)
    jobs.withdraw(canceled.id, "")
    assert canceled.stop()
    for seed in range(2, 2 + DEATHS):
        buried = begin(jobs, small_msh, seed)
        buried.blame()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"job {failed.id} failed: it took longer than 3600 s"),
        ("INFO", f"job {canceled.id} canceled"),
        ("WARNING", f"job {buried.id} failed: {QUARANTINED}"),
    ]


def test_pictures_that_are_drawn_together_are_done_together(jobs: Jobs, small_msh: bytes) -> None:
    ids = [submit(jobs, small_msh, seed) for seed in range(3)]
    estimates.present(jobs)
    estimates.measured(jobs, 2.0, decode_of(small_msh, FAST).work)  # each, two seconds
    for job_id, owner in zip(ids, ("batch", "batch", "other"), strict=True):
        jobs.queue.remove(job_id)  # as RQ takes it
        assert Attempt.begin(jobs, job_id, owner) is not None
    left = [estimates.eta_s(jobs, state(jobs, job_id)) for job_id in ids]
    assert left == pytest.approx([4.0, 4.0, 2.0])
    assert estimates.backlog_s(jobs) == pytest.approx(4.0)  # of the one worker that says it lives


def test_a_keeper_that_slept_gives_the_others_time_to_speak(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    attempt = begin(jobs, small_msh)
    silence(jobs, attempt)
    keeper = Keeper(jobs, Spool(tmp_path), tmp_path / "alive")
    keeper._trust_from, keeper._last = 0.0, jobs.now() - LEASE_S - 1
    keeper._beat()
    assert state(jobs, attempt.id).status == "running"
    keeper._trust_from = 0.0
    keeper._beat()
    assert state(jobs, attempt.id).status == "queued"


def test_a_worker_that_falls_silent_over_several_jobs_is_one(jobs: Jobs, small_msh: bytes) -> None:
    for seed, owner in enumerate(("batch", "batch", "other")):
        job_id = submit(jobs, small_msh, seed)
        jobs.queue.remove(job_id)
        attempt = Attempt.begin(jobs, job_id, owner)
        assert attempt is not None
        silence(jobs, attempt)
    jobs.reap()
    assert counters.read(jobs.store).get(counters.LEASES_LOST) == 2


def test_a_worker_whose_drawing_never_ends_falls_silent(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    """Also to who probes its process: no signal reaches it."""
    attempt = begin(jobs, small_msh)
    silence(jobs, attempt)
    keeper = Keeper(jobs, Spool(tmp_path), tmp_path / "alive")
    keeper.attempts = [attempt]
    keeper.stopped.set()  # one turn
    keeper.until = time.monotonic()
    keeper.run()
    assert not keeper.file.exists()
    jobs.reap()
    assert state(jobs, attempt.id).status == "queued"
    keeper.until = time.monotonic() + 60
    again = Attempt.begin(jobs, attempt.id)
    assert again is not None
    silence(jobs, again)
    keeper.attempts = [again]
    keeper.run()
    jobs.reap()
    assert state(jobs, attempt.id).status == "running"


def test_jobs_that_nobody_waits_for_delay_no_other(jobs: Jobs, small_msh: bytes) -> None:
    first, second = (submit(jobs, small_msh, seed) for seed in range(2))
    estimates.measured(jobs, 2.0, decode_of(small_msh, FAST).work)
    assert estimates.eta_s(jobs, state(jobs, second)) == pytest.approx(4.0)
    jobs.store.queue.zadd(jobs.subscribers(first), {"": jobs.now() - 1})  # its deadline has passed
    assert estimates.eta_s(jobs, state(jobs, second)) == pytest.approx(2.0)
    assert estimates.backlog_s(jobs) == pytest.approx(2.0)


def test_what_is_predicted_once_a_quick_worker_has_begun_counts(
    jobs: Jobs, small_msh: bytes
) -> None:
    attempt = begin(jobs, small_msh)
    jobs.save_eta(attempt.id, 1000.0)
    attempt.commit(b"png")
    attempt.measured(1.0)
    assert counters.read(jobs.store).get("eta_ratio:0.1") == 1


def test_interest_ends_by_the_servers_clock(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(jobs, small_msh)
    here = time.time()
    monkeypatch.setattr(time, "time", lambda: here + 7 * 24 * 3600)
    assert jobs.has_subscribers(attempt.id)
    assert attempt.look().wanted


def test_a_job_is_not_like_itself(jobs: Jobs, small_msh: bytes) -> None:
    """Where a keeper queued it again while its worker was about to begin it."""
    job_id = submit(jobs, small_msh)
    assert jobs.claim_alike(state(jobs, job_id), 4) == []
    assert jobs.queue.job_ids == [job_id]


def test_workers_that_are_gone_are_forgotten(jobs: Jobs) -> None:
    for number in range(estimates.REMEMBERED + 5):
        estimates.measured(jobs, 1.0, 1.0, f"worker-{-number}")
    known = jobs.store.queue.hkeys(jobs.store.key("sums"))
    last = (f"worker-{-number}".encode() for number in range(4, estimates.REMEMBERED + 5))
    assert set(known) == {*last}  # whatever their names


def test_a_bitstream_that_was_drawn_is_not_to_blame(jobs: Jobs, small_msh: bytes) -> None:
    job_id = submit(jobs, small_msh)
    for end in (Attempt.blame, lambda attempt: attempt.commit(b"png")):
        assert jobs.crash_count(decode_of(small_msh, FAST).digest) == (end is not Attempt.blame)
        attempt = Attempt.begin(jobs, job_id)
        assert attempt is not None
        end(attempt)
    assert jobs.crash_count(decode_of(small_msh, FAST).digest) == 0


def test_a_job_whose_workers_are_cut_off_again_and_again_is_given_up(
    jobs: Jobs, small_msh: bytes
) -> None:
    job_id = submit(jobs, small_msh)
    for n in range(MAX_ATTEMPTS):
        assert state(jobs, job_id).status == "queued", n
        attempt = Attempt.begin(jobs, job_id)
        assert attempt is not None
        silence(jobs, attempt)
        jobs.reap()
        jobs.forgive_worker(attempt.state)
    assert (state(jobs, job_id).status, state(jobs, job_id).attempts) == ("failed", MAX_ATTEMPTS)


def test_a_drained_attempt_does_not_count(
    jobs: Jobs, small_msh: bytes, small_compressai: bytes
) -> None:
    attempt = begin(jobs, small_msh)
    behind = submit(jobs, small_compressai)
    attempt.put_back()
    assert jobs.queue.job_ids == [attempt.id, behind]
    assert (state(jobs, attempt.id).attempts, state(jobs, attempt.id).status) == (0, "queued")


def test_a_kept_picture_is_handed_over_by_whoever_finds_it(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    spool = Spool(tmp_path)
    gone, late = begin(jobs, small_msh), begin(jobs, small_msh, 1)
    spool.keep(gone, b"kept")
    spool.keep(late, b"too late")
    late.fail("another end")
    spool.hand_over(jobs, busy={gone.id})
    assert [file.name[:32] for file in tmp_path.glob("*.png")] == [gone.id]
    spool.hand_over(jobs)
    assert jobs.store.picture(gone.id) == b"kept"
    assert state(jobs, gone.id).status == "succeeded"
    assert (state(jobs, late.id).status, jobs.store.picture(late.id)) == ("failed", None)
    assert not list(tmp_path.iterdir())


def test_kept_pictures_of_stores_that_are_gone_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("old", RECORD_TTL_S + 60), ("new", 60)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / f"{'0' * 32}.1.png"
        file.write_bytes(b"kept")
        os.utime(file, (time.time() - age_s,) * 2)
    Spool.forget(tmp_path)
    assert [file.parent.name for file in tmp_path.rglob("*.png")] == ["new"]


@pytest.fixture(scope="module")
def loaded() -> Library:
    return library.load()


@pytest.fixture
def context(
    jobs: Jobs, loaded: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """This process as a worker."""
    own: dict[str, Any] = {
        "jobs": jobs, "library": loaded, "spool": Spool(tmp_path), "max_pixels": 10**6,
        "keeper": Keeper(jobs, Spool(tmp_path), tmp_path), "stopping": False, "afterwards": [],
    }  # fmt: skip
    for name, value in own.items():
        monkeypatch.setattr(Context, name, value, raising=False)
    yield


def pictures(jobs: Jobs, ids: list[str]) -> list[image.Pixels]:
    found = []
    for job_id in ids:
        assert state(jobs, job_id).status == "succeeded", state(jobs, job_id).error
        found.append(image.read(jobs.store.picture(job_id) or b"", 10**6))
    return found


@pytest.mark.weights
def test_jobs_of_one_shape_are_drawn_together_as_each_alone(
    context: None,
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
        jobs.queue.remove(ids[0])  # as RQ takes it
        return [*ids, other]

    monkeypatch.setattr(Context, "batch", 4)
    *ids, other = submitted()
    tasks.enhance(ids[0])
    together = pictures(jobs, ids)
    assert jobs.queue.job_ids == [other]  # of other settings
    assert [jobs.store.queue.hget(jobs.key(i), "commits") for i in ids] == [b"1"] * 3

    jobs.store.queue.flushall()
    jobs.store.cache.flushall()
    monkeypatch.setattr(Context, "batch", 1)
    submitted()
    for job_id in ids:
        tasks.enhance(job_id)
    for a, b in zip(together, pictures(jobs, ids), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.weights
def test_a_cpu_draws_no_more_together_than_fits_into_a_window(
    context: None, jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "batch", 4)
    monkeypatch.setattr(tasks, "WINDOW", 2 * 12 * 8 + 1)  # 150×100 pixels have 12×8 positions
    ids = [submit(jobs, small_msh, seed) for seed in range(4)]
    jobs.queue.remove(ids[0])
    tasks.enhance(ids[0])
    assert jobs.queue.job_ids == ids[2:]
    assert len(pictures(jobs, ids[:2])) == 2


@pytest.mark.weights
def test_one_of_several_is_canceled_at_once_and_who_comes_back_is_served(
    context: None, jobs: Jobs, loaded: Library, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "batch", 3)
    settings, forward = Settings("ddim", 8), loaded.diffusion.net.denoiser.forward
    first, second, third = (submit(jobs, small_msh, seed, settings) for seed in range(3))
    jobs.queue.remove(first)  # as RQ takes it
    seen: list[tuple[str, ...]] = []

    def meanwhile(*given: Any) -> torch.Tensor:
        seen.append(tuple(state(jobs, name).status for name in (first, second, third)))
        if len(seen) == 3:
            jobs.withdraw(first, "")
            jobs.withdraw(second, "")
        if len(seen) == 6:
            jobs.subscribe(first, "", 60)
        return forward(*given)

    monkeypatch.setattr(loaded.diffusion.net.denoiser, "forward", meanwhile)
    tasks.enhance(first)
    tasks.settle()
    assert seen[2] == ("running", "running", "running")
    assert seen[4] == ("running", "canceled", "running")
    assert len(pictures(jobs, [first, third])) == 2
    assert (state(jobs, first).attempts, len(seen)) == (1, 8)


@pytest.mark.weights
@pytest.mark.parametrize("disk", ["good", "full"])
def test_what_is_drawn_waits_for_its_store_as_long_as_it_takes(
    context: None, jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """The time limits are of drawing, and the wait is no part of what drawing costs."""
    put, left = Store.put_picture, []
    draw, until = tasks._draw, []

    def drawn(*given: Any) -> None:
        until.append(Context.keeper.until - time.monotonic())
        draw(*given)

    def full(*_: Any) -> Path:
        raise OSError("no space left on device")

    def away(own: Store, *given: Any) -> None:
        left.append(signal.alarm(0))
        assert Context.keeper.until == math.inf
        if len(left) < 3:
            raise redis.ConnectionError("injected")
        put(own, *given)

    monkeypatch.setattr(Store, "put_picture", away)
    monkeypatch.setattr(tasks, "_draw", drawn)
    if disk == "full":
        monkeypatch.setattr(Spool, "keep", full)
    job_id = submit(jobs, small_msh)
    signal.alarm(600)
    tasks.enhance(job_id)
    tasks.settle()
    assert left == [0, 0, 0]
    assert 0 < until[0] - jobs.timeout_s <= tasks.LATE_S
    assert state(jobs, job_id).status == "succeeded"
    assert estimates.model(jobs) is None
    assert not list(Context.spool.folder.glob("*.png"))


@pytest.mark.weights
def test_one_bad_bitstream_fails_alone(
    context: None,
    jobs: Jobs,
    small_msh: bytes,
    small_compressai: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = bytearray(small_compressai)
    bad[-100] ^= 255
    monkeypatch.setattr(Context, "batch", 4)
    good, broken = submit(jobs, small_msh), submit(jobs, bytes(bad))
    jobs.queue.remove(good)
    tasks.enhance(good)
    assert [state(jobs, i).status for i in (good, broken)] == ["succeeded", "failed"]

    good, odd = submit(jobs, small_msh, 1), submit(jobs, small_compressai, 1)
    jobs.queue.remove(good)
    draft = Library.draft

    def drawn(own: Library, b: Bitstream, seed: int) -> DiffusionInput:
        if b.format == "compressai":
            raise RuntimeError("injected")
        return draft(own, b, seed)

    monkeypatch.setattr(Library, "draft", drawn)
    tasks.enhance(good)
    assert [state(jobs, i).status for i in (good, odd)] == ["succeeded", "failed"]
    assert state(jobs, odd).error == "internal error"


def short_of_memory(monkeypatch: pytest.MonkeyPatch, loaded: Library, most: int) -> list[int]:
    """The denoiser finds no memory for more pixels than `most`; the sizes that it was asked for."""
    denoiser, asked = loaded.diffusion.net.denoiser, []
    forward = denoiser.forward

    def limited(x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(x_t.shape[2] * x_t.shape[3])
        if asked[-1] > most:
            raise torch.OutOfMemoryError("injected")
        return forward(x_t, *rest)

    monkeypatch.setattr(denoiser, "forward", limited)
    return asked


def failing(monkeypatch: pytest.MonkeyPatch, loaded: Library, error: Exception) -> None:
    """The denoiser raises `error` whatever it is asked."""

    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(loaded.diffusion.net.denoiser, "forward", fail)


@pytest.fixture(scope="module")
def large(loaded: Library, photo: image.Pixels) -> bytes:
    from models.codec import bitstream, codec

    cut = codec.to_tensor(photo[:512, :512].copy())
    return bitstream.serialize(loaded.find(2, "mse").encode(cut, "msh", "exact"))


@pytest.mark.weights
def test_short_memory_makes_smaller_tiles(
    context: None, jobs: Jobs, loaded: Library, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.drawing.WINDOW", 1024)
    monkeypatch.setattr("worker.drawing.SMALLEST", 128)
    job_id = submit(jobs, large)
    tasks.enhance(job_id)
    (whole,) = pictures(jobs, [job_id])
    jobs.store.cache.flushall()
    asked = short_of_memory(monkeypatch, loaded, 400 * 400)
    submit(jobs, large)
    tasks.enhance(job_id)
    assert asked[0] == 512 * 512 and max(asked[-4:]) <= 400 * 400
    (tiled,) = pictures(jobs, [job_id])
    assert np.abs(whole.astype(int) - tiled).max() <= 1
    assert not Context.stopping


@pytest.mark.weights
def test_no_memory_at_all_ends_the_worker_and_leaves_the_job(
    context: None, jobs: Jobs, loaded: Library, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = short_of_memory(monkeypatch, loaded, 0)
    job_id = submit(jobs, large)
    jobs.queue.remove(job_id)
    tasks.enhance(job_id)
    tasks.settle()
    assert Context.stopping
    assert len(asked) > 2
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])
    assert jobs.crash_count(decode_of(large, FAST).digest) == 1


@pytest.mark.weights
def test_a_device_that_fails_at_everything_ends_the_worker_and_leaves_the_job(
    context: None, jobs: Jobs, loaded: Library, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    failing(monkeypatch, loaded, lost)
    job_id = submit(jobs, small_msh)
    jobs.queue.remove(job_id)
    tasks.enhance(job_id)
    tasks.settle()
    assert Context.stopping
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])


@pytest.mark.weights
def test_a_job_that_takes_too_long_fails_and_the_worker_goes_on(
    context: None, jobs: Jobs, loaded: Library, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, loaded, JobTimeoutException("as RQ's timer does"))
    job_id = submit(jobs, small_msh)
    tasks.enhance(job_id)
    ended = state(jobs, job_id)
    assert (ended.status, ended.error) == ("failed", "it took longer than 3600 s")
    assert not Context.stopping


def test_who_comes_while_a_worker_stops_is_served(jobs: Jobs, small_msh: bytes) -> None:
    job_id = submit(jobs, small_msh)
    jobs.queue.remove(job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    jobs.withdraw(job_id, "")
    jobs.subscribe(job_id, "late", 60)
    attempt.stop()
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])
    jobs.queue.remove(job_id)
    jobs.drop(job_id)  # the same of one that was not begun
    assert (state(jobs, job_id).status, jobs.queue.job_ids) == ("queued", [job_id])


@pytest.mark.weights
def test_what_is_canceled_keeps_its_best_preview(
    context: None, jobs: Jobs, loaded: Library, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(jobs, small_msh, 0, Settings("ddim", 50))
    calls: list[int] = []
    forward = loaded.diffusion.net.denoiser.forward

    def withdrawing(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            jobs.withdraw(job_id, "")
        return forward(*given)

    monkeypatch.setattr(loaded.diffusion.net.denoiser, "forward", withdrawing)
    tasks.enhance(job_id)
    tasks.settle()
    assert (state(jobs, job_id).status, len(calls)) == ("canceled", 5)
    preview = jobs.store.preview(job_id)
    assert preview is not None
    assert image.read(preview, 10**6).shape == (100, 150, 3)


def test_an_answer_that_is_lost_on_its_way_loses_no_job(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server took the job for us; the connection broke before it could say so."""
    job_id = submit(jobs, small_msh)
    change, calls = Jobs.change, []

    def broken(self: Jobs, *given: Any) -> bool:
        done = change(self, *given)
        calls.append(done)
        return done and len(calls) > 1

    monkeypatch.setattr(Jobs, "change", broken)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    assert attempt.look(1).wanted
    assert state(jobs, job_id).attempts == 1
    assert Attempt.begin(jobs, job_id) is None
