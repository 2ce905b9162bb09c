"""Redis goes away and comes back; the service and its worker stay."""

import concurrent.futures
import signal
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.chaos.rig import Server, until
from tests.conftest import Service, run_service, wait_for
from worker import embed

pytestmark = [pytest.mark.redis, pytest.mark.weights]


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("queue") / "redis", embed._QUEUE)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def own(queue: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with that one store."""
    stores = {"REDIS_URL": queue.url, "CACHE_REDIS_URL": queue.url}
    with run_service(tmp_path_factory.mktemp("degraded"), **stores) as running:
        until(lambda: "ready: afterimage-decodes" in running.log.read_text(), "its worker starts")
        yield running


def test_a_redis_that_hangs_is_as_one_that_is_away(
    own: Service, queue: Server, small_msh: bytes
) -> None:
    """Stopped, it takes connections and answers nothing."""
    asked: dict[str, str | int] = {"tier": "perceptual", "seed": 1}
    queue.process.send_signal(signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            waiting = [
                pool.submit(own.client.post, "/v1/decodes", params=asked, content=small_msh)
                for _ in range(60)
            ]
            time.sleep(1)
            began = time.monotonic()
            assert own.client.get("/readyz").json()["status"] == "degraded"
            assert own.client.post("/v1/decodes", content=small_msh).status_code == 200
            assert time.monotonic() - began < 4
            assert {one.result().status_code for one in waiting} == {503}
    finally:
        queue.process.send_signal(signal.SIGCONT)


def test_instant_decodes_go_on_without_redis_and_upgrades_when_it_is_back(
    own: Service, queue: Server, small_msh: bytes, small_compressai: bytes, page: Page
) -> None:
    asked = {"tier": "perceptual"}
    coded = {"name": "small.bin", "mimeType": "", "buffer": small_compressai}
    client = own.client
    assert client.get("/readyz").json() == {"status": "ok", "redis": "up"}
    before = client.post("/v1/decodes", params=asked, content=small_msh)
    wait_for(client, before.headers["location"])
    page.goto(str(client.base_url))
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    queue.kill()

    assert client.get("/readyz").json() == {"status": "degraded", "redis": "down"}
    assert client.post("/v1/decodes", content=small_compressai).status_code == 200  # a new one
    again = client.post("/v1/decodes", content=small_msh)
    assert (again.status_code, again.content) == (200, before.content)
    refused = client.post("/v1/decodes", params=asked, content=small_compressai)
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
    for path in ("", "/image", "/events"):
        assert client.get(before.headers["location"] + path).status_code == 503
    expect(page.locator("#away")).to_be_visible(timeout=10_000)
    page.set_input_files("#chosen", files=[coded])  # type: ignore[list-item]
    expect(page.locator("#times")).to_contain_text("Instant")
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#ring")).to_be_hidden()

    queue.start()
    until(lambda: client.get("/readyz").json()["status"] == "ok", "Redis is seen again", 20)
    kept = client.get(before.headers["location"])
    assert kept.json()["status"] == "succeeded"  # the queue is on disk
    made = client.post("/v1/decodes", params=asked, content=small_compressai)
    assert wait_for(client, made.headers["location"])["status"] == "succeeded"
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=30_000)
    expect(page.locator("#away")).to_be_hidden()
    assert "a worker ended" not in own.log.read_text()
