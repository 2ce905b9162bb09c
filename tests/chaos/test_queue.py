"""Faults, injected for real: what `design` promises of the queue, row by row."""

import concurrent.futures
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from models import bitstream, codec, image
from models.codec import Codec
from models.errors import Quarantined
from models.tiers import Settings
from tests.chaos.rig import Rig, rig, until
from tests.conftest import run_service, wait_for
from worker import figures
from worker.jobs import QUARANTINED

pytestmark = [pytest.mark.redis, pytest.mark.weights]

LONG = Settings("ddim", 400)
"""At 150×100 pixels longer than a worker takes to start."""
MIDDLE = Settings("ddim", 150)
SHORT = Settings("ddim", 60)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "rig") as made:
        yield made


@pytest.fixture(scope="module")
def other(shipped: Codec, photo: image.Pixels) -> bytes:
    """Another bitstream than `small_msh`."""
    x = codec.to_tensor(photo[200:300, 300:450].copy())
    return bitstream.serialize(shipped.encode(x, "msh", "exact"))


def test_a_killed_workers_job_runs_elsewhere_and_what_kills_two_is_quarantined(
    own: Rig, small_msh: bytes, other: bytes
) -> None:
    first = own.worker().ready()
    job = own.submit(small_msh, LONG)
    own.at_step(job, 3)
    second = own.worker().ready()  # idle, in a blocking read
    first.kill()
    assert until(lambda: own.state(job).attempts == 2, "the second attempt") < 15
    own.at_step(job, 3)
    third = own.worker().ready()
    second.kill()
    state = own.ended(job)
    assert (state.status, state.error) == ("failed", QUARANTINED)
    assert own.commits(job) == 0
    with pytest.raises(Quarantined):
        own.submit(small_msh, SHORT)
    assert third.process.poll() is None
    healthy = own.ended(own.submit(other, SHORT))
    assert (healthy.status, healthy.attempts) == ("succeeded", 1)


def test_a_worker_that_is_told_to_end_leaves_a_long_job_at_the_front(
    own: Rig, small_msh: bytes
) -> None:
    own.environment["AFTERIMAGE_GRACE_S"] = "2"
    worker = own.worker().ready()
    job, behind = own.submit(small_msh, MIDDLE), own.submit(small_msh, SHORT, 1)
    own.at_step(job, 5)
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: own.state(job).status == "queued", "it is queued again")
    assert time.monotonic() - began < 2
    assert worker.process.wait(30) == 0
    assert own.state(job).attempts == 0
    assert own.jobs.queue.job_ids == [job, behind]
    own.worker()
    for name in (job, behind):
        assert own.ended(name, 120).status == "succeeded"
        assert (own.state(name).attempts, own.commits(name)) == (1, 1)


def test_a_worker_that_is_told_to_end_finishes_what_fits(own: Rig, small_msh: bytes) -> None:
    worker = own.worker().ready()
    job = own.submit(small_msh, SHORT)
    own.at_step(job, 5)
    assert worker.terminate() == 0
    assert (own.state(job).status, own.commits(job)) == ("succeeded", 1)


def test_a_picture_finished_while_redis_is_away_is_stored_later(own: Rig, small_msh: bytes) -> None:
    worker = own.worker().ready()
    expected = own.submit(small_msh, SHORT)
    own.ended(expected)
    picture = own.store.picture(expected)
    own.store.cache.flushall()  # it is drawn again
    waiting = own.submit(small_msh, SHORT, 1)
    job = own.submit(small_msh, SHORT)
    own.at_step(job, 5)
    assert own.state(waiting).status == "succeeded"
    third = own.submit(small_msh, SHORT, 2)
    own.queue.process.kill()
    until(lambda: list((own.folder / "own/spool").rglob("*.png")), "the picture is kept")
    own.restart_queue(2)
    state = own.ended(job)
    assert (state.status, state.attempts, own.commits(job)) == ("succeeded", 1, 1)
    assert own.store.picture(job) == picture
    assert own.ended(third).status == "succeeded"
    assert worker.process.poll() is None
    assert not list((own.folder / "own/spool").rglob("*.png"))


def test_a_full_queue_refuses_jobs_and_lets_workers_finish(own: Rig, small_msh: bytes) -> None:
    with run_service(own.folder, "--workers", "1", **own.urls) as service:
        client, queue = service.client, own.store.queue
        asked = {"tier": "ddim-100", "steps": 200}
        first = client.post("/v1/decodes", params=asked, content=small_msh)
        assert first.status_code == 200
        queue.config_set("maxmemory", int(queue.info("memory")["used_memory"] / 0.9))
        before = sorted(queue.keys())
        full = client.post("/v1/decodes", params={**asked, "seed": 1}, content=small_msh)
        assert (full.status_code, full.json()["type"][-10:]) == (503, "queue-full")
        assert int(full.headers["retry-after"]) > 0
        queue.config_set("maxmemory", 1)  # and no room at all
        with pytest.raises(redis.RedisError):
            own.submit(small_msh, SHORT, 9)  # past the limit that the API keeps
        none = client.post("/v1/decodes", params={**asked, "seed": 2}, content=small_msh)
        assert none.status_code == 503
        assert client.post("/v1/decodes", content=small_msh).status_code == 200
        new = set(queue.keys()) - set(before)
        assert not [key for key in new if b":job:" in key or b":bitstream:" in key], new
        queue.config_set("maxmemory", 0)
        assert wait_for(client, first.headers["location"])["status"] == "succeeded"


def test_a_hundred_duplicates_at_two_processes_are_one_computation(
    own: Rig, small_msh: bytes
) -> None:
    asked = {"tier": "ddim-10", "steps": 20}
    with (
        run_service(own.folder, "--workers", "0", **own.urls) as first,
        run_service(own.folder, "--workers", "0", **own.urls) as second,
    ):
        made = first.client.post("/v1/decodes", params=asked, content=small_msh)
        waited = second.client.get(made.headers["location"], headers={"Prefer": "wait=6"})
        assert (waited.status_code, waited.json()["status"]) == (200, "queued")
        own.worker()
        own.worker()
        ports = [str(service.client.base_url) for service in (first, second)]

        def one(i: int) -> str:
            with httpx.Client(base_url=ports[i % 2], timeout=120) as client:
                made = client.post("/v1/decodes", params=asked, content=small_msh)
                location = made.headers["location"]
                ended = client.get(location, headers={"Prefer": "wait=60"}).json()
                assert ended["status"] == "succeeded", ended
                return str(client.get(f"{location}/image").headers["etag"])

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            etags = list(pool.map(one, range(100)))
        assert (len(etags), len(set(etags))) == (100, 1)
        again = first.client.post("/v1/decodes", params=asked, content=small_msh)
        job = again.headers["location"].rpartition("/")[2]
        assert (own.state(job).attempts, own.commits(job)) == (1, 1)
        assert figures.read(own.store).get(figures.SUCCEEDED) == 1  # over all records of the job


def test_pictures_are_never_in_the_queues_store(own: Rig, small_msh: bytes) -> None:
    own.worker()
    job = own.submit(small_msh, MIDDLE)
    own.jobs.watch(job)
    assert own.ended(job).status == "succeeded"
    assert own.store.preview(job) and own.store.picture(job)
    queue = own.store.queue
    for key in queue.keys():
        values = queue.dump(key) or b""
        assert b"\x89PNG" not in values and b"WEBP" not in values
        assert key.startswith((b"afterimage:", b"rq:"))
        assert queue.ttl(key) > 0 or key.startswith(b"rq:")
