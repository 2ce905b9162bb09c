"""Rate limits and job limits of callers, in a real Redis."""

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from models.tiers import Settings
from service import quotas
from service.auth import Caller
from service.problems import TooManyRequests
from service.quotas import JOB_TTL_S, SUBMIT_S, WINDOW_S, Quotas
from worker.queue import estimates, private_redis
from worker.queue.jobs import Jobs
from worker.queue.records import DecodeRequest
from worker.queue.store import Store, connect
from worker.settings import WorkerSettings

pytestmark = pytest.mark.redis

GALLERY = Caller("gallery", frozenset({"decode"}), requests_per_minute=3, jobs_at_once=2)
PRESS = replace(GALLERY, name="press")
FREE = Caller("free", frozenset({"decode"}))


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


@pytest.fixture
def counted(jobs: Jobs) -> Quotas:
    return Quotas(jobs)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the wall clock of this process; that of the Redis server stays."""
    now = time.time

    def move(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return move


def refused(call: Callable[[], object]) -> dict[str, str]:
    """The headers of the error that the call raises."""
    with pytest.raises(TooManyRequests) as error:
        call()
    return error.value.headers


def decode(seed: int) -> DecodeRequest:
    settings = Settings("ddim", 10, beta=1.0)
    return DecodeRequest("00" * 32, "perceptual", settings, seed, "c", "d", 2, 1000, 1000)


def job_id(seed: int) -> str:
    return decode(seed).id


def submit(jobs: Jobs, seed: int) -> None:
    jobs.submit(decode(seed), b"bitstream")


def test_headers_state_the_remaining_requests(counted: Quotas) -> None:
    for left in (2, 1, 0):
        headers = counted.request(GALLERY)
        assert headers["RateLimit-Policy"] == '"requests";q=3;w=60'
        assert re.fullmatch(rf'"requests";r={left};t=(60|59)', headers["RateLimit"])
    headers = refused(lambda: counted.request(GALLERY))
    assert headers["RateLimit-Policy"] == '"requests";q=3;w=60'
    assert headers["RateLimit"] == f'"requests";r=0;t={headers["Retry-After"]}'


def test_retry_after_is_the_first_second_in_which_a_request_passes(
    counted: Quotas, later: Callable[[float], None]
) -> None:
    for offset in (0, 7.5, 20):
        later(offset)
        counted.request(GALLERY)
    for offset in (20, 41.3):
        later(offset)
        wait_s = int(refused(lambda: counted.request(GALLERY))["Retry-After"])
        assert wait_s == pytest.approx(WINDOW_S - offset, abs=1)
        later(offset + wait_s - 1)
        refused(lambda: counted.request(GALLERY))  # a refused request is not counted
    later(offset + wait_s)
    assert '"requests";r=0' in counted.request(GALLERY)["RateLimit"]
    assert refused(lambda: counted.request(GALLERY))["Retry-After"] in {"7", "8"}


def test_callers_are_counted_separately(counted: Quotas) -> None:
    for _ in range(3):
        counted.request(GALLERY)
    refused(lambda: counted.request(GALLERY))
    assert '"requests";r=2' in counted.request(PRESS)["RateLimit"]


def test_a_caller_without_limits_has_the_services_limits_if_any(jobs: Jobs) -> None:
    assert Quotas(jobs).request(FREE) == {}
    for n in range(20):
        Quotas(jobs).job(FREE, str(n))
    limited = Quotas(jobs, requests_per_minute=1, jobs_at_once=1)
    limited.request(FREE)
    limited.job(FREE, "20")
    refused(lambda: limited.request(FREE))
    refused(lambda: limited.job(FREE, "21"))
    assert "q=3" in limited.request(GALLERY)["RateLimit-Policy"]


def test_several_processes_share_one_limit(redis_urls: tuple[str, str], store: Store) -> None:
    settings = WorkerSettings(REDIS_URL=redis_urls[0])
    stores = [connect(settings) for _ in range(3)]
    processes = [Quotas(Jobs(s)) for s in stores]
    busy = replace(GALLERY, requests_per_minute=20, jobs_at_once=7)

    def passes(n: int) -> tuple[bool, bool]:
        results = []
        quotas = processes[n % 3]
        for call in (lambda: quotas.request(busy), lambda: quotas.job(busy, f"job{n}")):
            try:
                call()
                results.append(True)
            except TooManyRequests:
                results.append(False)
        return results[0], results[1]

    with ThreadPoolExecutor(6) as pool:
        requests, begun = zip(*pool.map(passes, range(50)), strict=True)
    assert (sum(requests), sum(begun)) == (20, 7)
    for s in stores:
        s.close()


def test_every_key_has_the_prefix_and_expires(store: Store) -> None:
    prefixed = Quotas(Jobs(replace(store, prefix="mine")))
    prefixed.request(GALLERY)
    prefixed.job(GALLERY, "one")
    keys = sorted(key.decode() for key in store.queue.keys())  # type: ignore[union-attr]
    assert keys == ["mine:jobs-of:gallery", "mine:quota:requests/gallery/3/1/minute"]
    ttls = [store.queue.ttl(key) for key in keys]
    assert ttls == [pytest.approx(JOB_TTL_S, abs=5), pytest.approx(WINDOW_S, abs=5)]


def test_jobs_beyond_the_limit_are_refused_until_one_ends(counted: Quotas, jobs: Jobs) -> None:
    for seed in (1, 2, 1, 2):  # a job is counted once
        counted.job(GALLERY, job_id(seed))
        submit(jobs, seed)
    headers = refused(lambda: counted.job(GALLERY, job_id(3)))
    assert headers["RateLimit-Policy"] == '"jobs";q=2'
    assert headers["RateLimit"] == f'"jobs";r=0;t={headers["Retry-After"]}'
    counted.job(GALLERY, job_id(1))
    counted.job(PRESS, job_id(3))

    jobs.fail_queued(job_id(1), "broken")
    counted.job(GALLERY, job_id(3))
    refused(lambda: counted.job(GALLERY, job_id(1)))
    counted.release_job(GALLERY, job_id(2))
    counted.job(GALLERY, job_id(1))


def test_a_job_counts_before_it_is_submitted(counted: Quotas, jobs: Jobs) -> None:
    submit(jobs, 1)
    jobs.fail_queued(job_id(1), "broken")
    counted.job(GALLERY, job_id(1))  # for a retry
    counted.job(GALLERY, job_id(2))
    refused(lambda: counted.job(GALLERY, job_id(3)))
    submit(jobs, 1)
    submit(jobs, 2)
    refused(lambda: counted.job(GALLERY, job_id(3)))


def test_a_job_that_is_never_submitted_counts_for_a_short_time(
    counted: Quotas, later: Callable[[float], None]
) -> None:
    counted.job(GALLERY, "one")
    counted.job(GALLERY, "two")
    later(SUBMIT_S - 1)
    refused(lambda: counted.job(GALLERY, "three"))
    later(SUBMIT_S + 1)
    counted.job(GALLERY, "three")


def test_a_job_that_never_ends_counts_until_the_longest_subscription_ends(
    counted: Quotas, jobs: Jobs, later: Callable[[float], None]
) -> None:
    for seed in (1, 2):
        counted.job(GALLERY, job_id(seed))
        submit(jobs, seed)
    later(JOB_TTL_S - 1)
    refused(lambda: counted.job(GALLERY, job_id(3)))
    later(JOB_TTL_S + 1)
    counted.job(GALLERY, job_id(3))


def test_retry_after_is_the_eta_of_the_first_job_to_end(
    counted: Quotas, jobs: Jobs, store: Store
) -> None:
    for seed in (1, 2):
        counted.job(GALLERY, job_id(seed))
        submit(jobs, seed)
    assert (
        refused(lambda: counted.job(GALLERY, job_id(3)))["Retry-After"] == "5"
    )  # no cost model yet
    estimates.record_duration(jobs, 5.9, decode(1).work, "a worker")  # the duration of each job
    assert refused(lambda: counted.job(GALLERY, job_id(3)))["Retry-After"] == "6"


def test_without_redis_requests_pass_and_jobs_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with private_redis.servers(tmp_path) as (queue, _):
        store = connect(WorkerSettings(REDIS_URL=queue))
        counted = Quotas(Jobs(store))
        for _ in range(3):
            counted.request(GALLERY)
        refused(lambda: counted.request(GALLERY))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert counted.request(GALLERY) == {}
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "requests are not counted while Redis is unavailable"
    ]
    with pytest.raises(redis.RedisError):
        counted.job(GALLERY, "one")
    store.close()


@pytest.fixture
def stopped(store: Store) -> Iterator[Callable[[int], None]]:
    """Sends signals to the queue's server."""
    pid = store.queue.info()["process_id"]
    yield lambda number: os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)


def test_a_hanging_redis_delays_one_request_and_is_used_again_later(
    redis_urls: tuple[str, str],
    store: Store,
    stopped: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = redis.Redis.from_url(redis_urls[0], socket_timeout=0.2)
    counted = Quotas(Jobs(replace(store, queue=client)))
    counted.request(GALLERY)
    monkeypatch.setattr(quotas, "PAUSE_S", 0.5)
    stopped(signal.SIGSTOP)
    assert counted.request(GALLERY) == {}
    began = time.monotonic()
    for _ in range(100):
        assert counted.request(GALLERY) == {}
    assert time.monotonic() - began < 0.1
    stopped(signal.SIGCONT)
    time.sleep(0.6)
    assert "r=" in counted.request(GALLERY)["RateLimit"]
    client.close()
