"""Batches over a real S3 server with faults, and over stores whose access changes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from service.batches import feeder, task
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.api_keys import TOKENS, guarded_settings
from tests.support.batches import PNG, Drawer, counts, ended, folder_stores, state, submitted
from tests.support.object_server import BUCKET, KEY_ID, SECRET, FaultProxy, s3_server
from tests.support.waiting import until
from worker.queue import object_stores
from worker.queue.batches.store import Batches
from worker.queue.jobs import Jobs
from worker.queue.references import Reference
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]

NAMES = [f"{n}{'é' * (n == 3)}" for n in range(8)]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    with s3_server(tmp_path_factory.mktemp("s3") / "served") as port:
        proxy = FaultProxy(port, 3)
        yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def settings(
    redis_urls: tuple[str, str], proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceSettings]:
    options = f'region = "us-east-1", endpoint = "http://127.0.0.1:{proxy.port}", allow_http = true'
    file = folder_stores(
        tmp_path_factory.mktemp("stores"),
        f"""
        [stores.s3]
        url = "s3://{BUCKET}"
        options = {{ {options} }}
        write = true
        """,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setattr(object_stores, "REQUEST_S", 2)
        patch.setattr(object_stores, "RETRIES", 0)
        patch.setattr(feeder, "STEP_S", 0.05)
        patch.setattr(task, "POLL_S", 0.05)
        patch.setattr("service.batches.items.MAX_PAUSE_S", 0.2)
        patch.setattr("worker.deliveries.MAX_BACKOFF_S", 0.0)
        yield ServiceSettings(
            REDIS_URL=redis_urls[0], CACHE_REDIS_URL=redis_urls[1], stores=file, job_timeout_s=1
        )


@pytest.fixture(scope="module")
def app(settings: ServiceSettings) -> Iterator[httpx.Client]:
    with weights.loaded_once(), run_app(settings) as client:
        yield client


@pytest.fixture
def api(app: httpx.Client, store: Store, proxy: FaultProxy) -> httpx.Client:
    """The API over empty stores of jobs, without faults."""
    proxy.faults.clear()
    proxy.broken.clear()
    return app


@pytest.fixture
def drawer(store: Store, settings: ServiceSettings, small_msh: bytes) -> Drawer:
    objects = object_stores.connect(settings)
    for name in NAMES:
        ref = Reference("s3", f"in/{name}.msh")
        objects.write(ref, small_msh, "application/octet-stream", {})
    return Drawer(Jobs(store, timeout_s=1), objects)


def failures(document: dict[str, object]) -> list[tuple[int, str, str]]:
    """Number, kind and detail of each problem."""
    rows: list[dict[str, object]] = document["failed"]  # type: ignore[assignment]
    return [
        (item["number"], item["problem"]["type"].rpartition(":")[2], item["problem"]["detail"])  # type: ignore[index, misc]
        for item in rows
    ]


def items(folder: str) -> list[dict[str, object]]:
    return [
        {"source": f"store:s3/in/{name}.msh", "target": f"store:s3/{folder}/{name}.png", "seed": n}
        for n, name in enumerate(NAMES)
    ]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (503, "store-away", "the object store 's3' answered 503; try again later; gave up after"),
        (403, "store-refused", "the object store 's3' refused store:s3/in/4.msh (403)"),
        ("slow", "store-away", "the object store 's3' did not answer in time"),
        ("cut", "store-away", "the object store 's3' cannot be reached"),
    ],
)
def test_an_item_whose_source_cannot_be_read_fails_and_others_go_on(
    api: httpx.Client, drawer: Drawer, proxy: FaultProxy, fault: int | str, kind: str, said: str
) -> None:
    proxy.broken["in/4.msh"] = fault
    location = submitted(api, items=items(f"read-{fault}"))
    others = {"succeeded": len(NAMES) - 1}

    def drawn() -> bool:
        drawer.work()
        return counts(state(api, location)).get("succeeded") == len(NAMES) - 1

    until(drawn, "the others are drawn", 10)
    document = ended(api, location, drawer)
    assert counts(document) == {**others, "failed": 1}
    ((number, found, detail),) = failures(document)
    assert (number, found) == (4, kind) and detail.startswith(said)
    proxy.broken.clear()
    assert api.post(f"{location}/retry").status_code == 202
    assert counts(ended(api, location, drawer)) == {"succeeded": len(NAMES)}
    assert len(drawer.drawn) == len(set(drawer.drawn)) == len(NAMES)


@pytest.mark.parametrize(("fault", "kind"), [(503, "store-away"), (403, "store-refused")])
def test_an_item_whose_target_cannot_be_written_fails_and_others_go_on(
    api: httpx.Client, drawer: Drawer, proxy: FaultProxy, fault: int, kind: str
) -> None:
    proxy.broken[f"write-{fault}/6.png"] = fault
    location = submitted(api, items=items(f"write-{fault}"), on_existing="replace")
    document = ended(api, location, drawer)
    assert counts(document) == {"succeeded": len(NAMES) - 1, "failed": 1}
    ((number, found, detail),) = failures(document)
    assert (number, found) == (6, kind) and str(fault) in detail
    proxy.broken.clear()
    api.post(f"{location}/retry")
    assert counts(ended(api, location, drawer)) == {"succeeded": len(NAMES)}
    assert len(drawer.drawn) == len(NAMES)
    head = drawer.writer.objects.head(Reference("s3", f"write-{fault}/6.png"))
    assert head is not None and head.attributes["decode"] in drawer.drawn


def test_a_prefix_of_an_s3_store_is_listed_in_parts_despite_faults(
    api: httpx.Client, drawer: Drawer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.batches.listing.KEYS", 3)
    request = {"source": "store:s3/in/", "target": "store:s3/listed/"}
    proxy.broken["list-type=2"] = 403
    location = submitted(api, **request)
    document = ended(api, location, drawer)
    assert document["problem"]["type"] == "urn:afterimage:problem:store-refused"
    proxy.broken["list-type=2"] = 503
    assert api.post(f"{location}/retry").status_code == 202
    seen = len(proxy.seen)
    until(lambda: len(proxy.seen) > seen + 2, "the listing is tried again")
    assert state(api, location)["listing"] is True
    proxy.broken.clear()
    document = ended(api, location, drawer)
    assert counts(document) == {"succeeded": len(NAMES)} and document["problem"] is None
    assert len(drawer.drawn) == 1
    objects = drawer.writer.objects
    for name in NAMES:
        assert objects.read(Reference("s3", f"listed/{name}.png"), 1000) == PNG
    again = ended(api, submitted(api, **request, seed=1), drawer)
    assert counts(again) == {"skipped": len(NAMES)} and len(drawer.drawn) == 1


def test_rights_and_quotas_hold_when_an_item_runs(
    settings: ServiceSettings, store: Store, small_msh: bytes, tmp_path: Path
) -> None:
    keys = Path(guarded_settings(tmp_path)["AFTERIMAGE_API_KEYS"])
    file = folder_stores(tmp_path)
    for n in range(6):
        (tmp_path / f"in/{n}.msh").write_bytes(small_msh)
    changes = {"api_keys": keys, "stores": file, "prefix": "guarded"}  # not those of `app`
    guarded, store = settings.model_copy(update=changes), replace(store, prefix="guarded")
    drawer = Drawer(Jobs(store), object_stores.connect(guarded))
    items = [
        {"source": f"store:in/{n}.msh", "target": f"store:out/{n}.png", "seed": n} for n in range(6)
    ]
    mine, other = ({"Authorization": f"Bearer {TOKENS[name]}"} for name in ("single", "both"))

    def counted(api: httpx.Client, expected: dict[str, int]) -> bool:
        return counts(api.get(location, headers=mine).json()) == expected

    with weights.loaded_once(), run_app(guarded) as api:
        body = {"items": items, "steps": 1}
        location = api.post("/v1/batches", json=body, headers=mine).headers["location"]
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry"), ("GET", "/events")):
            assert api.request(method, location + path, headers=other).status_code == 404
        for done in range(3):  # the key may have one job at a time
            until(lambda: drawer.queued(), "an item is queued")
            assert len(drawer.queued()) == 1
            expected = {"waiting": 5 - done, "queued": 1} | ({"succeeded": done} if done else {})
            until(partial(counted, api, expected), "the last item's end is counted")
            drawer.work()
    text = file.read_text()
    file.write_text(text.replace("write = true", "write = false"))
    with weights.loaded_once(), run_app(guarded) as api:
        api.headers.update(mine)
        document = ended(api, location, drawer)
        assert {kind for _, kind, _ in failures(document)} == {"store-forbidden"}
        failed = len(failures(document))
        assert failed >= 2 and counts(document) == {"succeeded": 6 - failed, "failed": failed}
        file.write_text(text)
        keys.write_text(keys.read_text().replace('name = "single"', 'name = "renamed"'))
        until(lambda: api.get(location).status_code == 404, "the key is read again")
        batches, id = Batches(store), location.rpartition("/")[2]
        batch = batches.get(id)
        assert batch is not None and batches.retry(batch)
        until(lambda: not batches.running(), "the batch ends")
        problems = batches.failed(id, -1, 100).values()
        assert {p["type"] for p in problems} == {"urn:afterimage:problem:unauthorized"}
        assert len(problems) == failed and len(drawer.drawn) == 6 - failed
