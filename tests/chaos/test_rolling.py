"""New processes for old ones, while requests come."""

import itertools
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.chaos.rig import rig, until
from tests.conftest import run_service

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]


class Load(threading.Thread):
    """Five pictures a second, every fifth with a job; where requests go may change."""

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
            with httpx.Client(base_url=self.url, timeout=60) as client:
                asked = {"tier": tier, "seed": number}
                answer = client.post("/v1/decodes", params=asked, content=self.data)
            self.answers.append(answer)


def test_a_rolling_restart_under_load_answers_every_request(
    tmp_path: Path, small_msh: bytes
) -> None:
    with rig(tmp_path / "rig") as own:
        folders = [tmp_path / name for name in ("old", "new")]
        for folder in folders:
            folder.mkdir()
        options = ("--workers", "0")
        old_worker = own.worker().ready()
        load = Load(small_msh)
        with run_service(folders[0], *options, **own.urls) as old:
            load.url = str(old.client.base_url)
            load.start()
            until(lambda: len(load.answers) > 10, "some requests")
            with run_service(folders[1], *options, **own.urls) as new:
                load.url = str(new.client.base_url)  # as a Service does before it ends a pod
                time.sleep(1)  # its preStop: what was on its way arrives
                old.process.terminate()
                assert old.process.wait(60) == 0
                own.worker().ready()
                assert old_worker.terminate() == 0
                seen = len(load.answers)
                until(lambda: len(load.answers) > seen + 10, "more requests")
                load.stopped.set()
                load.join()
                wrong = [a.text for a in load.answers if a.status_code not in {200, 202}]
                assert not wrong
                urls = [a.headers["location"] for a in load.answers if "location" in a.headers]
                assert len(urls) > 3
                states = [own.ended(url.rpartition("/")[2]) for url in urls]
        assert {state.status for state in states} == {"succeeded"}
        assert {state.attempts for state in states} == {1}
