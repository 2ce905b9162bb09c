"""`afterimage queue` against a running service, whose worker draws."""

import json
import time

import httpx
import pytest

from service.cli import main as cli
from service.cli import queue
from tests.support.service import Service
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SLOW: dict[str, str | int] = {"tier": "ddim-10", "steps": 400}


def submit(client: httpx.Client, data: bytes, seed: int) -> str:
    answer = client.post("/v1/decodes", params={**SLOW, "seed": seed}, content=data)
    assert answer.status_code == 200
    return answer.headers["location"].rpartition("/")[2]


def test_the_command_shows_the_queue_and_cancels_and_retries(
    service: Service, small_msh: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    client = service.client
    url = str(client.base_url)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["queue", *args])
        return (status, *capsys.readouterr())

    ids = [submit(client, small_msh, seed) for seed in (3201, 3202)]
    until(lambda: client.get(f"/v1/decodes/{ids[0]}").json()["status"] == "running", "it runs")
    status, out, _ = run("--url", url)
    assert status == 0
    words = [line.split() for line in out.splitlines()]
    assert ["PRIORITY", "CALLER", "JOBS", "UNSERVED"] in words
    assert ["interactive", "127.0.0.1", "1"] in [row[:3] for row in words]
    (running,) = (row for row in words if row[:1] == [ids[0]])
    assert running[1:4] == ["127.0.0.1", "interactive", "ddim-10"] and "/400" in running[5]
    shown = json.loads(run("--url", url, "--json")[1])
    assert shown["interactive"] == 1 and shown["workers"][0]["device"] == "cpu"
    assert running[4] == shown["workers"][0]["name"]
    assert run("cancel", ids[1], "--url", url)[:2] == (0, f"{ids[1]} is canceled\n")
    assert run("retry", ids[1], "--url", url)[:2] == (0, f"{ids[1]} is queued\n")
    for job_id in ids:
        assert run("--url", url, "cancel", job_id)[0] == 0
    until(lambda: client.get(f"/v1/decodes/{ids[0]}").json()["status"] == "canceled", "it stops")


def test_errors_name_what_is_wrong(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(service.client.base_url)
    for args, message in (
        (("cancel", "0" * 32), f"there is no decode {'0' * 32}"),
        (("release", "a" * 64), f"the bitstream {'a' * 64} is not quarantined"),
        (("drain", "nobody"), "there is no live worker nobody"),
        (("cancel", "no id?"), "id: String should match pattern"),
    ):
        assert cli.main(["queue", *args, "--url", url]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["queue", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err


def test_watch_shows_the_queue_until_it_is_interrupted(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float] = []

    def sleep(seconds: float) -> None:
        shown.append(seconds)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert cli.main(["queue", "--watch", "--url", str(service.client.base_url)]) == cli.INTERRUPTED
    assert shown == [queue.WATCH_S] * 3
    assert capsys.readouterr().out.count("batch jobs wait") == 3
