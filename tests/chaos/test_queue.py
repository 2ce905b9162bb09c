"""Injected faults: killed workers, signals, and a Redis that is down."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import image
from models.codec import bitstream, codec
from models.codec.codec import Codec
from models.errors import Quarantined
from models.tiers import Settings
from tests.support.forked import Forked, worker_main
from tests.support.jobs import FAST, expire_lease
from tests.support.rig import Rig, Worker, rig
from tests.support.waiting import until
from worker.queue.quarantine import QUARANTINED

pytestmark = [pytest.mark.redis, pytest.mark.weights]

LONG = Settings("ddim", 80)
"""Takes longer than the workers' grace period at 150×100 pixels."""
SHORT = Settings("ddim", 30)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One rig for all tests, to start fewer workers; each test uses other decodes."""
    with rig(tmp_path_factory.mktemp("rig") / "own", forked=True, AFTERIMAGE_GRACE_S="2") as made:
        yield made


@pytest.fixture
def worker(own: Rig) -> Worker:
    """A worker that is ready: one that another test left, or a new one."""
    return own.one()


@pytest.fixture(scope="module")
def other(shipped: Codec, photo: image.Pixels) -> bytes:
    """A bitstream other than `small_msh`."""
    x = codec.to_tensor(photo[200:300, 300:450].copy())
    return bitstream.serialize(shipped.encode(x, "msh", "exact"))


def test_a_killed_workers_job_is_retried_and_quarantined_after_two_kills(
    own: Rig, worker: Worker, small_msh: bytes, other: bytes
) -> None:
    own.worker().ready()  # one worker draws, the other is idle
    job = own.submit(other, LONG)
    own.at_step(job, 3)
    own.drawing(job).kill()
    assert until(lambda: own.state(job).attempts == 2, "the second attempt") < 15
    own.at_step(job, 3)
    third = own.worker()
    own.drawing(job).kill()
    expire_lease(own.jobs, job)  # the first one has expired by itself
    state = own.ended(job)
    assert (state.status, state.error) == ("failed", QUARANTINED)
    assert own.commits(job) == 0
    with pytest.raises(Quarantined):
        own.submit(other, SHORT)
    assert own.alive() == [third]
    healthy = own.ended(own.submit(small_msh, FAST, 1))
    assert (healthy.status, healthy.attempts) == ("succeeded", 1)


def test_a_stopping_worker_puts_a_long_job_back_at_the_front(
    own: Rig, worker: Worker, small_msh: bytes
) -> None:
    job, behind = own.submit(small_msh, LONG), own.submit(small_msh, FAST, 2)
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


def test_a_picture_finished_while_redis_is_down_is_stored_later(
    own: Rig, worker: Worker, small_msh: bytes
) -> None:
    expected = own.submit(small_msh, SHORT)
    own.ended(expected)
    picture = own.store.picture(expected)
    own.store.cache.flushall()  # it is drawn again
    waiting = own.submit(small_msh, FAST, 3)
    job = own.submit(small_msh, SHORT)
    own.at_step(job, 5)
    assert own.state(waiting).status == "succeeded"
    third = own.submit(small_msh, FAST, 4)
    own.queue.process.kill()
    until(lambda: list((own.folder / "own/spool").rglob("*.png")), "the picture is spooled")
    own.restart_queue(2)
    state = own.ended(job)
    assert (state.status, state.attempts, own.commits(job)) == ("succeeded", 1, 1)
    assert own.store.picture(job) == picture
    assert own.ended(third).status == "succeeded"
    assert worker.process.poll() is None
    assert not list((own.folder / "own/spool").rglob("*.png"))


def test_pictures_are_never_stored_in_the_queue(own: Rig, worker: Worker, small_msh: bytes) -> None:
    job = own.submit(small_msh, LONG, 5)
    with own.store.queue.pipeline() as pipe:
        own.jobs.watch(job, [""], 0, pipe)
        pipe.execute()
    assert own.ended(job).status == "succeeded"
    assert own.store.preview(job) and own.store.picture(job)
    queue = own.store.queue
    keys: list[Any] = queue.keys()
    for key in keys:
        values = queue.dump(key) or b""
        assert b"\x89PNG" not in values and b"WEBP" not in values
        assert key.startswith((b"afterimage:", b"rq:"))
        forever = -1  # -2: the key has been removed since
        assert queue.ttl(key) != forever or key.startswith(b"rq:")


def test_a_stopping_worker_finishes_a_short_job(own: Rig, worker: Worker, small_msh: bytes) -> None:
    job = own.submit(small_msh, SHORT, 6)
    own.at_step(job, 26)  # 4 of 30 steps are left, which takes less than the grace period
    assert worker.terminate() == 0
    assert (own.state(job).status, own.commits(job)) == ("succeeded", 1)


def test_a_worker_without_its_queue_exits_on_sigterm(own: Rig, worker: Worker) -> None:
    own.queue.kill()
    time.sleep(1.5)  # the worker reconnects every second
    assert worker.process.poll() is None
    assert worker.terminate(5) == 0
    own.start_queue()


def test_a_process_with_other_variables_for_its_imports_is_not_forked(
    own: Rig, tmp_path: Path
) -> None:
    environment = own.environment | {"NUMBA_CPU_NAME": "generic"}
    with pytest.raises(ValueError, match="NUMBA_CPU_NAME: read during imports"):
        Forked(worker_main, environment, tmp_path / "log")
