"""What `afterimage serve` does when one of its worker processes dies."""

import os
import signal
from pathlib import Path

import pytest
import rq

from tests.support.jobs import expire_lease
from tests.support.service import Service, children
from tests.support.waiting import until, wait_for
from worker.queue.jobs import Jobs

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def test_the_job_of_a_killed_worker_runs_again(service: Service, small_msh: bytes) -> None:
    asked: dict[str, str | int] = {"tier": "ddpm-1000", "steps": 30}
    answer = service.client.post("/v1/decodes", params=asked, content=small_msh)
    location = answer.headers["location"]
    until(lambda: service.client.get(location).json()["step"] >= 2, "the second step")
    with service.stores() as store:
        (worker,) = rq.Worker.all(store.queue)
        assert worker.pid in children(service.process.pid)
        os.kill(worker.pid, signal.SIGKILL)
        expire_lease(Jobs(store), location.rpartition("/")[2])
    state = wait_for(service.client, location)
    assert (state["status"], state["attempts"], state["step"]) == ("succeeded", 2, 30)
    assert "worker.main exited with status -9; restarting" in service.log.read_text()
    with service.stores() as store:
        (pid,) = {w.pid for w in rq.Worker.all(store.queue)} - {worker.pid}
    assert b"worker.main" in Path(f"/proc/{pid}/cmdline").read_bytes()  # started, not forked
