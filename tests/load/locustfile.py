"""Users of `make load`: each asks for instant pictures, or for upgrades, one after the other."""

import itertools
import os
import time
from pathlib import Path

from locust import HttpUser, constant, task

STREAMS = itertools.cycle(
    file.read_bytes() for file in sorted(Path(os.environ["LOAD_STREAMS"]).glob("*.msh"))
)
"""Different bitstreams in turn, because the service decodes equal ones at the same time once."""
HOSTS = itertools.cycle(os.environ["LOAD_HOSTS"].split())
"""API processes, between which users are divided as a load balancer would."""
SEEDS = itertools.count(time.time_ns() // 1000)
"""Seeds that earlier runs have not used: the pictures of those runs are cached."""
UPGRADES = os.environ["LOAD_UPGRADES"] == "1"


class User(HttpUser):
    """Sends the next request when the last one has been answered."""

    host = "http://127.0.0.1"
    wait_time = constant(0)

    def on_start(self) -> None:
        self.client.base_url = next(HOSTS)

    @task
    def picture(self) -> None:
        if UPGRADES:
            self._upgrade()
        else:
            self.client.post("/v1/decodes", data=next(STREAMS), name="instant")

    def _upgrade(self) -> None:
        """Submit a job and wait for its end; the time in between is the row `upgrade`."""
        params = {"tier": "perceptual", "seed": next(SEEDS)}
        headers = {"Prefer": "respond-async"}
        began = time.perf_counter()
        answer = self.client.post(
            "/v1/decodes", params=params, data=next(STREAMS), headers=headers, name="submit"
        )
        location, status = answer.headers["location"], "queued"
        while status in {"queued", "running"}:
            with self.client.get(
                location, headers={"Prefer": "wait=30"}, name="wait", catch_response=True
            ) as answer:
                status = answer.json()["status"]
                if status not in {"queued", "running", "succeeded"}:
                    answer.failure(answer.text)
        self.environment.events.request.fire(
            request_type="job", name="upgrade", response_time=1e3 * (time.perf_counter() - began),
            response_length=0, exception=None, context={},
        )  # fmt: skip
