"""The service and its worker keep running while Redis is down, hangs, restarts or is full."""

import concurrent.futures
import signal
import time
from collections.abc import Iterator

import pytest
import redis
from playwright.sync_api import FilePayload, Page, expect

from models.tiers import Settings
from service.client import Client
from tests.support.rig import Rig, Worker, rig
from tests.support.service import Service, fork_service
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("stores") / "own", forked=True) as made:
        yield made


@pytest.fixture(scope="module")
def own(stores: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that was started while its queue's Redis was down."""
    stores.queue.kill()
    folder = tmp_path_factory.mktemp("degraded")
    with fork_service(folder, "--workers", "0", **stores.urls) as running:
        yield running


@pytest.fixture
def worker(own: Service, stores: Rig) -> Iterator[Worker]:
    """A worker that must survive the test; the queue's Redis is up."""
    if stores.queue.process.poll() is not None:
        stores.start_queue()
    until(lambda: own.client.get("/readyz").json()["status"] == "ok", "Redis is seen", 20)
    made = stores.one()
    yield made
    assert made.process.poll() is None


def test_a_service_without_redis_still_decodes_instantly(
    own: Service, stores: Rig, tiny_msh: bytes
) -> None:
    stores.queue.kill()
    assert own.client.get("/readyz").json() == {"status": "degraded", "redis": "down"}
    assert own.client.post("/v1/decodes", content=tiny_msh).status_code == 200
    answer = own.client.post("/v1/decodes?tier=perceptual", content=tiny_msh)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_a_redis_that_hangs_is_treated_like_one_that_is_down(
    own: Service, stores: Rig, worker: Worker, tiny_msh: bytes, small_compressai: bytes
) -> None:
    """A stopped server accepts connections, but sends no replies."""
    params: dict[str, str | int] = {"tier": "perceptual", "seed": 1}
    stores.queue.process.send_signal(signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            waiting = [
                pool.submit(own.client.post, "/v1/decodes", params=params, content=tiny_msh)
                for _ in range(60)
            ]
            time.sleep(1)
            began = time.monotonic()
            assert own.client.get("/readyz").json()["status"] == "degraded"
            for data in (tiny_msh, small_compressai):
                assert own.client.post("/v1/decodes", content=data).status_code == 200
            assert time.monotonic() - began < 4
            assert {one.result().status_code for one in waiting} == {503}
    finally:
        stores.queue.process.send_signal(signal.SIGCONT)


def test_instant_decodes_work_without_redis_and_jobs_when_it_is_back(
    own: Service, stores: Rig, worker: Worker, tiny_msh: bytes, small_compressai: bytes, page: Page
) -> None:
    params = {"tier": "perceptual"}
    coded: FilePayload = {"name": "small.bin", "mimeType": "", "buffer": small_compressai}
    client = own.client
    assert client.get("/readyz").json() == {"status": "ok", "redis": "up"}
    before = client.post("/v1/decodes", params=params, content=tiny_msh)
    wait_for(client, before.headers["location"])
    page.goto(str(client.base_url))
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    stores.queue.kill()

    assert client.get("/readyz").json() == {"status": "degraded", "redis": "down"}
    assert client.post("/v1/decodes", content=small_compressai).status_code == 200  # not cached
    again = client.post("/v1/decodes", content=tiny_msh)
    assert (again.status_code, again.content) == (200, before.content)
    refused = client.post("/v1/decodes", params=params, content=small_compressai)
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
    for path in ("", "/image", "/events"):
        assert client.get(before.headers["location"] + path).status_code == 503
    expect(page.locator("#away")).to_be_visible(timeout=10_000)
    page.set_input_files("#chosen", files=[coded])
    expect(page.locator("#times")).to_contain_text("Instant")
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#ring")).to_be_hidden()

    stores.start_queue()
    until(lambda: client.get("/readyz").json()["status"] == "ok", "Redis is seen again", 20)
    kept = client.get(before.headers["location"])
    assert kept.json()["status"] == "succeeded"  # the queue's data are on disk
    made = client.post("/v1/decodes", params=params, content=small_compressai)
    assert wait_for(client, made.headers["location"])["status"] == "succeeded"
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=30_000)
    expect(page.locator("#away")).to_be_hidden()


def test_drafts_and_jobs_work_without_the_cache(
    own: Service, stores: Rig, worker: Worker, tiny_msh: bytes
) -> None:
    params: dict[str, str | int] = {"tier": "perceptual", "seed": 5}
    instant = own.client.post("/v1/decodes", content=tiny_msh)
    stores.cache.kill()
    made = own.client.post("/v1/decodes", params=params, content=tiny_msh)
    assert (made.status_code, made.content) == (200, instant.content)
    assert "afterimage_redis_up 0.0" in own.client.get("/metrics").text
    stores.cache.start()
    assert wait_for(own.client, made.headers["location"])["status"] == "succeeded"
    assert "afterimage_redis_up 1.0" in own.client.get("/metrics").text


def test_a_client_waits_for_its_decode_while_redis_restarts(
    own: Service, stores: Rig, worker: Worker, tiny_msh: bytes
) -> None:
    with Client(str(own.client.base_url)) as client:
        before, kinds = len(own.log.read_text()), []
        for update in client.decode(tiny_msh, "ddim-100", steps=120, seed=3, previews=False):
            kinds.append(update.kind)
            if update.kind == "progress" and kinds.count("progress") == 3:
                stores.queue.kill()
                time.sleep(1)
                stores.start_queue()
    assert kinds[-1] == "final"
    assert "Traceback" not in own.log.read_text()[before:]


def test_a_full_queue_refuses_jobs_and_lets_workers_finish(
    own: Service, stores: Rig, worker: Worker, tiny_msh: bytes
) -> None:
    client, queue = own.client, stores.store.queue
    params: dict[str, str | int] = {"tier": "ddim-100", "steps": 150}
    first = client.post("/v1/decodes", params=params, content=tiny_msh)
    assert first.status_code == 200
    # beside this, the buffers of connections, which come and go, are small
    queue.set("ballast", bytes(16 * 2**20))
    queue.config_set("maxmemory", int(queue.info("memory")["used_memory"] / 0.9))
    before = sorted(queue.keys())
    headers = {"Idempotency-Key": "of a full queue"}
    full = client.post(
        "/v1/decodes", params={**params, "seed": 1}, content=tiny_msh, headers=headers
    )
    assert (full.status_code, full.json()["type"][-10:]) == (503, "queue-full")
    assert int(full.headers["retry-after"]) > 0
    queue.config_set("maxmemory", 1)  # no memory at all
    with pytest.raises(redis.RedisError):
        stores.submit(tiny_msh, Settings("ddim", 60), 9)  # without the API's check
    none = client.post("/v1/decodes", params={**params, "seed": 2}, content=tiny_msh)
    assert none.status_code == 503
    assert client.post("/v1/decodes", content=tiny_msh).status_code == 200
    new = set(queue.keys()) - set(before)
    kinds = (b":job:", b":bitstream:", b":idempotency:")
    assert not [key for key in new if any(kind in key for kind in kinds)], new
    queue.config_set("maxmemory", 0)
    queue.delete("ballast")
    assert wait_for(client, first.headers["location"])["status"] == "succeeded"
