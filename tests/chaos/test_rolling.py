"""Two API processes with one queue, and a rolling restart under load."""

import concurrent.futures
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.rig import Rig, rig
from tests.support.service import Service, fork_service
from tests.support.waiting import until
from worker.queue import counters

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]


class Load(threading.Thread):
    """Five requests per second to `url`, every fifth for a job."""

    def __init__(self, data: bytes) -> None:
        super().__init__(daemon=True)
        self.data, self.url = data, ""
        self.stopped = threading.Event()
        self.answers: list[httpx.Response] = []

    def run(self) -> None:
        for number in itertools.count():
            if self.stopped.wait(0.2):
                return
            tier = "instant" if number % 5 else "perceptual"
            with httpx.Client(base_url=self.url, timeout=60, verify=False) as client:
                params: dict[str, str | int] = {"tier": tier, "seed": number}
                answer = client.post("/v1/decodes", params=params, content=self.data)
            self.answers.append(answer)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("rig") / "own", forked=True) as made:
        yield made


@pytest.fixture(scope="module")
def two(own: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Two API processes without workers."""
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(
                fork_service(tmp_path_factory.mktemp("service"), "--workers", "0", **own.urls)
            )
            for _ in range(2)
        )
        yield first, second


def test_a_hundred_equal_requests_to_two_processes_run_one_job(
    own: Rig, two: tuple[Service, Service], small_msh: bytes
) -> None:
    clients = [service.client for service in two]
    asked: dict[str, str | int] = {"tier": "ddim-10", "steps": 20}
    before = counters.read(own.store).get(counters.SUCCEEDED)
    made = clients[0].post("/v1/decodes", params=asked, content=small_msh)
    waited = clients[1].get(made.headers["location"], headers={"Prefer": "wait=6"})
    assert (waited.status_code, waited.json()["status"]) == (200, "queued")
    own.worker()
    own.worker()

    def one(i: int) -> str:
        url = clients[i % 2].base_url  # without TLS, whose certificates take 20 ms to read
        with httpx.Client(base_url=url, timeout=120, verify=False) as client:
            made = client.post("/v1/decodes", params=asked, content=small_msh)
            location = made.headers["location"]
            ended = client.get(location, headers={"Prefer": "wait=60"}).json()
            assert ended["status"] == "succeeded", ended
            return str(client.get(f"{location}/image").headers["etag"])

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        etags = list(pool.map(one, range(100)))
    assert (len(etags), len(set(etags))) == (100, 1)
    again = clients[0].post("/v1/decodes", params=asked, content=small_msh)
    job = again.headers["location"].rpartition("/")[2]
    assert (own.state(job).attempts, own.commits(job)) == (1, 1)
    after = counters.read(own.store).get(counters.SUCCEEDED)
    assert after - before == 1  # counted over all records of the job


def test_a_rolling_restart_under_load_fails_no_request(
    own: Rig, two: tuple[Service, Service], small_msh: bytes
) -> None:
    old, new = two
    old_workers = own.alive() or [own.worker().ready()]
    load = Load(small_msh)
    load.url = str(old.client.base_url)
    load.start()
    until(lambda: len(load.answers) > 10, "some requests")
    own.worker().ready()
    load.url = str(new.client.base_url)  # as Kubernetes does before it stops a pod
    time.sleep(1)  # the preStop delay, for requests in flight
    old.process.terminate()
    assert old.process.wait(60) == 0
    assert {worker.terminate() for worker in old_workers} == {0}
    seen = len(load.answers)
    until(lambda: len(load.answers) > seen + 10, "more requests")
    load.stopped.set()
    load.join()
    assert not [a.text for a in load.answers if a.status_code not in {200, 202}]
    urls = [a.headers["location"] for a in load.answers if "location" in a.headers]
    assert len(urls) > 3
    states = [own.ended(url.rpartition("/")[2]) for url in urls]
    assert {state.status for state in states} == {"succeeded"}
    assert {state.attempts for state in states} == {1}
