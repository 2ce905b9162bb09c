"""What locust's users do: an instant picture again and again, or an upgrade and its end."""

import itertools
import os
from pathlib import Path

from locust import HttpUser, constant, task

DATA = (Path(__file__).parents[1] / "data/kodim23.msh").read_bytes()
HOSTS = itertools.cycle(os.environ["LOAD_HOSTS"].split())
"""API processes, between which users are divided as a load balancer would."""
SEEDS = itertools.count()
UPGRADES = os.environ["LOAD_UPGRADES"] == "1"


class User(HttpUser):
    """One at a time."""

    host = "http://127.0.0.1"
    wait_time = constant(0)

    def on_start(self) -> None:
        self.client.base_url = next(HOSTS)

    @task
    def picture(self) -> None:
        if not UPGRADES:
            self.client.post("/v1/decodes", data=DATA, name="instant")
            return
        asked = {"tier": "perceptual", "seed": next(SEEDS)}
        headers = {"Prefer": "respond-async"}
        answer = self.client.post(
            "/v1/decodes", params=asked, data=DATA, headers=headers, name="submit"
        )
        location, status = answer.headers["location"], "queued"
        while status in {"queued", "running"}:
            with self.client.get(
                location, headers={"Prefer": "wait=30"}, name="wait", catch_response=True
            ) as answer:
                status = answer.json()["status"]
                if status not in {"queued", "running", "succeeded"}:
                    answer.failure(answer.text)
