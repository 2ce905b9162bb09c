"""Jobs in a real Redis, and a real worker process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job
from rq.serializers import JSONSerializer

from models import image
from models.tiers import TIERS, Settings
from tests.support.forked import Forked, Process, worker_main
from tests.support.jobs import decode_of
from tests.support.waiting import until
from worker.attempt import Attempt, LeaseLost
from worker.heartbeat import Heartbeat
from worker.queue import estimates, events
from worker.queue.jobs import HEARTBEAT_S, Jobs
from worker.queue.records import DecodeRequest, JobState
from worker.queue.store import Store
from worker.queue.urls import NoRedis
from worker.spool import Spool

pytestmark = pytest.mark.redis


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


@pytest.fixture
def worker(
    redis_urls: tuple[str, str], store: Store, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process, started as the service does."""
    environment = {"REDIS_URL": redis_urls[0], "CACHE_REDIS_URL": redis_urls[1]}
    command = [sys.executable, "-P", "-m", "worker.main"]
    process = subprocess.Popen(command, env=os.environ | environment)
    yield process
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture
def forked_worker(redis_urls: tuple[str, str], store: Store, tmp_path: Path) -> Iterator[Process]:
    """A worker process that starts faster."""
    environment = {"REDIS_URL": redis_urls[0], "CACHE_REDIS_URL": redis_urls[1]}
    process = Forked(worker_main, os.environ | environment, tmp_path / "worker.log")
    yield process
    process.terminate()
    assert process.wait(60) == 0


def ended(jobs: Jobs, job_id: str, seconds: float = 120) -> JobState:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = jobs.get(job_id)
        assert state is not None
        if state.status not in {"queued", "running"}:
            return state
        time.sleep(0.05)
    pytest.fail(f"job {job_id} did not end within {seconds} s")


def test_the_job_id_depends_on_all_but_the_tiers_name(small_msh: bytes) -> None:
    a = decode_of(small_msh)
    assert a.id == decode_of(small_msh).id
    assert a.id == decode_of(small_msh, tier="another name, same settings").id
    assert a.id != decode_of(small_msh, seed=1).id
    assert len(a.id) == 32


def test_the_job_id_follows_the_documented_recipe() -> None:
    d = DecodeRequest("ab" * 32, "ddim-10", Settings("ddim", 10), 5, "c" * 16, "d" * 16, 2, 64, 64)
    import hashlib

    settings = '{"beta":0.0,"eta":0.0,"gamma":1.0,"guidance":1.0,"sampler":"ddim","steps":10}'
    text = f"afterimage-1\n{'ab' * 32}\n{settings}\n5\n{'c' * 16}\n{'d' * 16}"
    assert d.id == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_a_redis_that_is_too_old_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.check()
    monkeypatch.setattr(store.queue, "info", lambda _section: {"redis_version": "6.0.16"})
    with pytest.raises(NoRedis, match=r"has version 6\.0\.16; use 6\.2 or later"):
        store.check()


def test_a_new_job_is_queued_once(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    first, is_new = jobs.submit(d, small_msh)
    again, is_new_again = jobs.submit(d, small_msh)
    assert (is_new, is_new_again) == (True, False)
    assert first == again
    assert (first.status, first.step, first.total) == ("queued", 0, 2)
    assert jobs.queue.job_ids == [d.id]
    assert estimates.outlook_of(jobs, first).position == 0
    assert jobs.store.bitstream(d.digest) == small_msh


def test_concurrent_submissions_queue_one_job(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    is_new: list[bool] = []
    threads = [
        threading.Thread(target=lambda: is_new.append(jobs.submit(d, small_msh)[1]))
        for _ in range(20)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(is_new) == [False] * 19 + [True]
    assert jobs.queue.job_ids == [d.id]


def test_every_key_of_a_job_expires(jobs: Jobs, small_msh: bytes) -> None:
    jobs.submit(decode_of(small_msh), small_msh)
    keys = jobs.store.queue.keys("afterimage:*")
    assert len(keys) == 8
    assert all(jobs.store.queue.ttl(k) > 0 for k in keys)


def test_queued_jobs_are_json_and_name_the_task(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    job = Job.fetch(d.id, jobs.store.queue, serializer=JSONSerializer)
    assert (job.func_name, list(job.args)) == ("worker.tasks.enhance", [d.id])
    data = jobs.store.queue.hget(f"rq:job:{d.id}", "data")
    assert isinstance(data, bytes) and small_msh not in data


def test_a_job_lost_between_queue_and_worker_is_queued_again(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    assert jobs.missing() == set()
    jobs.queue.remove(d.id)  # a worker took it and crashed before it began
    assert jobs.missing() == {d.id}
    jobs.requeue({d.id})
    assert jobs.queue.job_ids == [d.id]
    assert jobs.missing() == set()


def test_a_job_queued_again_after_a_failure_does_not_expire(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    jobs.store.queue.expire(f"rq:job:{d.id}", 60)  # as RQ does when a job raises
    jobs.fail_queued(d.id, "internal error")
    jobs.submit(d, small_msh)
    assert jobs.store.queue.ttl(f"rq:job:{d.id}") == -1


def test_a_record_lost_during_an_attempt_counts_as_none(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    attempt = Attempt.begin(jobs, d.id)
    assert attempt is not None
    jobs.store.queue.flushall()
    with pytest.raises(LeaseLost):
        attempt.poll(1)
    assert jobs.get(d.id) is None
    assert jobs.submit(d, small_msh)[1]


def test_a_full_queue_store_does_not_stop_the_heartbeat(
    jobs: Jobs, small_msh: bytes, tmp_path: Path
) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    attempt = Attempt.begin(jobs, d.id)
    assert attempt is not None
    before = jobs.store.queue.config_get("maxmemory")["maxmemory"]
    assert before is not None
    jobs.store.queue.config_set("maxmemory", "1")
    try:
        heartbeat = Heartbeat(jobs, Spool(tmp_path), tmp_path / "alive")
        heartbeat.attempts = [attempt]
        heartbeat.start()
        time.sleep(HEARTBEAT_S + 1)
        assert heartbeat.is_alive()
        (alive,) = (tmp_path / "alive").iterdir()  # read by health checks
        assert time.time() - alive.stat().st_mtime < HEARTBEAT_S + 1
    finally:
        jobs.store.queue.config_set("maxmemory", before)
        heartbeat.stopped.set()
        heartbeat.join()
    assert not alive.exists()


def test_a_worker_that_gets_sigterm_while_it_loads_exits_at_once(
    redis_urls: tuple[str, str],
) -> None:
    environment = {"REDIS_URL": redis_urls[0], "CACHE_REDIS_URL": redis_urls[1]}
    command = [sys.executable, "-P", "-m", "worker.main"]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE)
    while not handled_signals(process.pid) >> signal.SIGTERM - 1 & 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"ready" not in stderr


def handled_signals(pid: int) -> int:
    """Bit mask of the signals for which a process has handlers."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16)


def test_an_unknown_job_is_none(jobs: Jobs) -> None:
    assert jobs.get("nothing") is None


def test_a_failed_job_may_be_submitted_again(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    jobs.queue.empty()  # type: ignore[no-untyped-call]
    jobs.fail_queued(d.id, "broken")
    state = jobs.get(d.id)
    assert state is not None and (state.status, state.error) == ("failed", "broken")
    assert jobs.submit(d, small_msh)[1]
    stream: Any = jobs.store.queue.xrange(events.key(jobs.store, d.id))
    assert [fields[b"kind"] for _, fields in stream] == [b"queued"]  # the old end is gone


def test_all_keys_of_a_withdrawn_job_expire(jobs: Jobs, small_msh: bytes) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    assert not jobs.withdraw(d.id, "")
    assert jobs.queue.job_ids == []
    keys = set(jobs.store.queue.keys("*")) - {b"rq:queues"}  # RQ's set of queue names
    assert all(jobs.store.queue.ttl(k) > 0 for k in keys)


def test_a_submission_during_a_withdrawal_keeps_the_job(
    jobs: Jobs, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh, "first")
    has_subscribers, calls = Jobs.has_subscribers, 0

    def submitting(jobs: Jobs, job_id: str) -> bool:
        nonlocal calls
        calls += 1
        result = has_subscribers(jobs, job_id)
        if calls == 1:
            jobs.submit(d, small_msh, "second")
        return result

    monkeypatch.setattr(Jobs, "has_subscribers", submitting)
    assert jobs.withdraw(d.id, "first")
    state = jobs.get(d.id)
    assert state is not None and state.status == "queued"
    assert jobs.line.job_ids() == {d.id}


@pytest.mark.weights
def test_a_worker_draws_the_picture_and_reports_progress(
    worker: subprocess.Popen[bytes], jobs: Jobs, small_msh: bytes
) -> None:
    d = decode_of(small_msh)
    jobs.submit(d, small_msh)
    state = ended(jobs, d.id)
    assert (state.status, state.error) == ("succeeded", "")
    assert (state.step, state.total, state.attempts) == (2, 2, 1)
    assert 0 < state.created <= state.started <= state.ended
    png = jobs.store.picture(d.id)
    assert png is not None
    assert image.read(png, 10**6).shape == (100, 150, 3)
    assert b"synthesised detail" in png
    assert not jobs.submit(d, small_msh)[1]
    jobs.store.cache.flushall()
    lost = jobs.get(d.id)
    assert lost is not None and lost.status == "expired"
    assert jobs.submit(d, small_msh)[1]
    assert ended(jobs, d.id).status == "succeeded"
    assert jobs.store.picture(d.id) == png


@pytest.mark.weights
def test_a_worker_draws_the_job_of_another_caller_after_the_drawing_that_it_has_begun(
    forked_worker: Process, jobs: Jobs, small_msh: bytes
) -> None:
    many = [decode_of(small_msh, seed=seed) for seed in range(12)]
    for d in many:
        jobs.submit(d, small_msh, "many")
    until(lambda: jobs.running, "the worker begins", 60)
    patient, other = decode_of(small_msh, seed=100), decode_of(small_msh, seed=101)
    jobs.submit(patient, small_msh, "library", priority="batch")
    jobs.submit(other, small_msh, "other")
    queued_at = time.time()
    seen = ended(jobs, other.id)
    assert seen.status == "succeeded"
    states = [ended(jobs, d.id) for d in many]
    assert {state.status for state in states} == {"succeeded"}
    between = [state for state in states if queued_at < state.started < seen.started]
    assert len(between) <= 1  # it may have been taken just before
    assert sum(state.started > seen.started for state in states) >= 9
    assert ended(jobs, patient.id).started > max(state.started for state in states)


@pytest.mark.weights
def test_a_worker_continues_after_foreign_and_failing_jobs(
    forked_worker: Process, jobs: Jobs, small_compressai: bytes, small_msh: bytes,
    tmp_path: Path,
) -> None:  # fmt: skip
    mark = tmp_path / "mark"
    jobs.queue.enqueue_call("pathlib.Path.touch", args=(str(mark),), job_id="foreign")
    damaged = bytearray(small_compressai)
    damaged[-100] ^= 255
    broken = decode_of(bytes(damaged))
    jobs.submit(broken, bytes(damaged))
    other = replace(decode_of(small_msh), decoder="0" * 16)
    jobs.submit(other, small_msh)
    good = decode_of(small_msh)
    jobs.submit(good, small_msh)
    assert ended(jobs, good.id).status == "succeeded"
    assert not mark.exists()
    for d, message in ((broken, "entropy|escape"), (other, "which this worker does not have")):
        state = ended(jobs, d.id)
        assert state.status == "failed"
        assert re.search(message, state.error)


def test_a_worker_without_redis_exits_with_an_error() -> None:
    command = [sys.executable, "-P", "-m", "worker.main"]
    environment = {k: v for k, v in os.environ.items() if "REDIS_URL" not in k}
    for extra, text in (({}, "REDIS_URL"), ({"REDIS_URL": "redis://127.0.0.1:1"}, "cannot start")):
        done = subprocess.run(command, env=environment | extra, capture_output=True, text=True)
        assert done.returncode != 0
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_the_perceptual_tier_has_few_steps() -> None:
    settings = TIERS["perceptual"].settings
    assert settings is not None and settings.steps <= 10 and settings.beta == 1
