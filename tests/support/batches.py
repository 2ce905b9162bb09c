"""Stores in folders, and a worker that commits pictures without drawing them, for batches."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support.waiting import until
from worker.attempt import Attempt
from worker.deliveries import Deliveries
from worker.queue import order
from worker.queue.jobs import Jobs
from worker.queue.object_stores import ObjectStores
from worker.queue.records import PRIORITIES

PNG = b"\x89PNG\r\n\x1a\n of a batch"
"""What `Drawer` commits as the picture of every job."""


def folder_stores(root: Path, extra: str = "") -> Path:
    """The file of the stores `in`, which may be read, and `out`, which may be read and written."""
    for name in ("in", "out"):
        (root / name).mkdir(parents=True, exist_ok=True)
    file = root / "stores.toml"
    file.write_text(
        f"""
        [stores.in]
        url = "file://{root}/in"
        [stores.out]
        url = "file://{root}/out"
        write = true
        {extra}
        """
    )
    return file


class Drawer:
    """Takes queued jobs as a worker does, commits `PNG` for each, and writes targets."""

    def __init__(self, jobs: Jobs, objects: ObjectStores) -> None:
        self.jobs, self.writer = jobs, Deliveries(jobs, objects, 10**6)
        self.drawn: list[str] = []
        self.deepest = 0
        """Largest number of queued jobs that was seen."""

    def queued(self) -> list[str]:
        """The ids of the queued jobs, in order."""
        line = self.jobs.line
        ids = [id for priority in PRIORITIES for id in order.first(line, 1000, priority)]
        self.deepest = max(self.deepest, len(ids))
        return ids

    def begin(self) -> Attempt | None:
        """Take the next queued job."""
        state = self.jobs.record(ids[0]) if (ids := self.queued()) else None
        if state is None or not self.jobs.line.claim(state):
            return None
        return Attempt.begin(self.jobs, state.id)

    def finish(self, attempt: Attempt) -> None:
        """Commit the picture of a job, and write the targets that are due."""
        attempt.commit(PNG)
        self.drawn.append(attempt.id)
        self.write()

    def write(self) -> None:
        """Write the targets that are due."""
        while self.writer.deliver_one():
            pass

    def work(self) -> bool:
        """Write the targets that are due, and draw one job; False if none is queued."""
        self.write()
        attempt = self.begin()
        if attempt is not None:
            self.finish(attempt)
        return attempt is not None


def submitted(api: httpx.Client, **request: Any) -> str:
    """Submit a batch; returns its location."""
    answer = api.post("/v1/batches", json={"steps": 1, **request})
    assert answer.status_code == 202, answer.text
    location = str(answer.headers["location"])
    assert re.fullmatch("/v1/batches/[0-9a-f]{32}", location)
    return location


def state(api: httpx.Client, location: str, **query: int) -> dict[str, Any]:
    """The document of a batch."""
    answer = api.get(location, params=query)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    assert sum(document["counts"].values()) == document["total"]
    return document


def counts(document: dict[str, Any]) -> dict[str, int]:
    """The counts that are not 0."""
    return {status: count for status, count in document["counts"].items() if count}


def ended(api: httpx.Client, location: str, drawer: Drawer, seconds: float = 60) -> dict[str, Any]:
    """Draw until the batch has ended; returns its document."""

    def done() -> bool:
        while drawer.work():
            pass
        return bool(state(api, location)["status"] != "running")

    until(done, "the batch ends", seconds)
    return state(api, location)


def numbered(count: int, **more: int) -> Iterator[dict[str, Any]]:
    """Items `store:in/N.msh` -> `store:out/N.png`."""
    for number in range(count):
        yield {"source": f"store:in/{number}.msh", "target": f"store:out/{number}.png", **more}
