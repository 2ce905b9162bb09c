"""Batches over folders: the API in process with its feeder, and jobs that are committed undrawn."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.batches import feeder, task
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.batches import (
    PNG,
    Drawer,
    counts,
    ended,
    folder_stores,
    numbered,
    state,
    submitted,
)
from tests.support.waiting import until
from worker.queue import object_stores
from worker.queue.batches.store import Batches
from worker.queue.jobs import Jobs
from worker.queue.outbox import Outbox
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]


@pytest.fixture(scope="module")
def settings(
    redis_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceSettings]:
    root = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeder, "STEP_S", 0.02)
        patch.setattr(task, "POLL_S", 0.02)
        patch.setattr("service.batches.items.FULL_PAUSE_S", 0.02)
        yield ServiceSettings(
            REDIS_URL=redis_urls[0], CACHE_REDIS_URL=redis_urls[1], stores=folder_stores(root)
        )


@pytest.fixture(scope="module")
def root(settings: ServiceSettings) -> Path:
    assert settings.stores is not None
    return settings.stores.parent


@pytest.fixture(scope="module")
def app(settings: ServiceSettings) -> Iterator[httpx.Client]:
    with weights.loaded_once(), run_app(settings) as client:
        yield client


@pytest.fixture
def api(app: httpx.Client, store: Store) -> httpx.Client:
    """The API over empty stores."""
    return app


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


@pytest.fixture
def drawer(jobs: Jobs, settings: ServiceSettings) -> Drawer:
    return Drawer(jobs, object_stores.connect(settings))


@pytest.fixture
def sources(root: Path, small_msh: bytes) -> Iterator[Path]:
    """The folder of the store `in`, with `0.msh` to `9.msh`; that of `out` is empty."""
    for number in range(10):
        (root / f"in/{number}.msh").write_bytes(small_msh)
    yield root / "in"
    for file in [*root.glob("in/**/*"), *root.glob("out/**/*")]:
        if file.is_file():
            file.unlink()


def test_every_item_is_one_ordinary_decode(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    items = [{**item, "seed": n % 5} for n, item in enumerate(numbered(10))]
    location = submitted(api, items=items, tier="ddim-10")
    document = ended(api, location, drawer)
    assert (document["status"], counts(document)) == ("ended", {"succeeded": 10})
    assert document["ended"] and document["pictures_per_minute"] > 0 and document["failed"] == []
    assert len(drawer.drawn) == 5  # equal decodes are drawn once
    for number in range(10):
        assert (sources.parent / f"out/{number}.png").read_bytes() == PNG
    seeds = {drawer.jobs.record(id).decode.seed for id in drawer.drawn}  # type: ignore[union-attr]
    assert seeds == {0, 1, 2, 3, 4}
    asked: dict[str, str | int] = {
        "tier": "ddim-10",
        "steps": 1,
        "seed": 3,
        "source": "store:in/0.msh",
    }
    assert api.post("/v1/decodes", params=asked).headers["x-cache"] == "hit"
    again = ended(api, submitted(api, items=items, tier="ddim-10", on_existing="replace"), drawer)
    assert counts(again) == {"succeeded": 10} and len(drawer.drawn) == 5


def test_a_prefix_is_a_batch_of_the_objects_below_it(
    api: httpx.Client, drawer: Drawer, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.batches.listing.KEYS", 3)
    (sources / "sub").mkdir(exist_ok=True)
    (sources / "sub/ä b.msh").write_bytes((sources / "0.msh").read_bytes())
    (sources / "sub/notes.txt").write_text("no bitstream")
    (sources / "sub/.msh").write_text("no name")
    location = submitted(api, source="store:in/", target="store:out/all/", format="png", seed=4)
    document = ended(api, location, drawer)
    assert counts(document) == {"succeeded": 11} and document["listing"] is False
    written = sorted(str(f.relative_to(sources.parent)) for f in sources.parent.glob("out/**/*.*"))
    assert written == [*(f"out/all/{n}.png" for n in range(10)), "out/all/sub/ä b.png"]
    assert [drawer.jobs.record(id).decode.seed for id in drawer.drawn] == [4]  # type: ignore[union-attr]
    location = submitted(api, source="store:in/sub/", target="store:out/", suffix=".txt")
    document = ended(api, location, drawer)
    problem = document["failed"][0]["problem"]
    assert (counts(document), problem["type"]) == (
        {"failed": 1}, "urn:afterimage:problem:unsupported-codec"
    )  # fmt: skip
    document = ended(api, submitted(api, source="store:in/none/", target="store:out/"), drawer)
    assert (document["status"], document["total"]) == ("ended", 0)


def test_the_queue_holds_a_bounded_number_of_items(
    api: httpx.Client, drawer: Drawer, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "WINDOW", 7)
    items = [
        {"source": "store:in/0.msh", "target": f"store:out/{n}.png", "seed": n} for n in range(40)
    ]
    location = submitted(api, items=items)
    until(lambda: len(drawer.queued()) == 7, "the window is full")
    assert counts(state(api, location)) == {"waiting": 33, "queued": 7}
    document = ended(api, location, drawer)
    assert counts(document) == {"succeeded": 40}
    assert drawer.deepest == 7 and len(drawer.drawn) == len(set(drawer.drawn)) == 40


def test_existing_targets_are_skipped_or_replaced(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    (sources.parent / "out/3.png").write_bytes(b"mine")
    (sources / "3.msh").unlink()
    document = ended(api, submitted(api, items=list(numbered(5))), drawer)
    assert counts(document) == {"succeeded": 4, "skipped": 1}
    assert (sources.parent / "out/3.png").read_bytes() == b"mine"
    document = ended(api, submitted(api, items=list(numbered(5)), on_existing="replace"), drawer)
    assert counts(document) == {"succeeded": 4, "failed": 1}
    assert document["failed"] == [
        {
            "number": 3, "source": "store:in/3.msh", "target": "store:out/3.png", "seed": 0,
            "seed_text": "0", "problem": {
                "type": "urn:afterimage:problem:object-not-found",
                "detail": "there is no object store:in/3.msh",
            },
        }
    ]  # fmt: skip
    (sources / "3.msh").write_bytes((sources / "0.msh").read_bytes())
    document = ended(api, submitted(api, items=list(numbered(5)), on_existing="replace"), drawer)
    assert counts(document) == {"succeeded": 5} and len(drawer.drawn) == 1
    assert (sources.parent / "out/3.png").read_bytes() == PNG


@pytest.mark.parametrize("seed", [2**53 + 1, str(2**53 + 1), str(2**64 - 1)])
def test_seeds_may_be_strings(
    api: httpx.Client, drawer: Drawer, sources: Path, seed: int | str
) -> None:
    items: list[dict[str, Any]] = [*numbered(2)]
    items[0]["seed"], items[1]["source"] = seed, "store:in/none.msh"
    document = ended(api, submitted(api, items=items, seed=seed), drawer)
    (drawn,), (failed,) = drawer.drawn, document["failed"]
    assert str(api.get(f"/v1/decodes/{drawn}").json()["seed_text"]) == str(seed)
    assert failed["seed_text"] == str(seed)


def test_failed_items_are_listed_in_pages_and_taken_again(
    api: httpx.Client, drawer: Drawer, sources: Path, small_msh: bytes
) -> None:
    for number, damaged in ((1, b""), (4, small_msh[:-1]), (7, small_msh[:-1] + b"\0")):
        (sources / f"{number}.msh").write_bytes(damaged)
    (sources / "8.msh").unlink()
    location = submitted(api, items=list(numbered(10)))
    first = (ended(api, location, drawer), state(api, location, limit=3))[1]
    assert [item["number"] for item in first["failed"]] == [1, 4, 7]
    kinds = [item["problem"]["type"].rpartition(":")[2] for item in first["failed"]]
    assert kinds == ["malformed-header", "checksum-mismatch", "checksum-mismatch"]
    assert first["next"] == f"{location}?after=7&limit=3"
    last = api.get(first["next"]).json()
    assert [item["number"] for item in last["failed"]] == [8] and last["next"] is None
    for number in (1, 4, 8):
        (sources / f"{number}.msh").write_bytes(small_msh)
    retried = api.post(f"{location}/retry")
    assert retried.status_code == 202 and retried.json()["status"] == "running"
    document = ended(api, location, drawer)
    assert counts(document) == {"succeeded": 9, "failed": 1}
    assert [item["number"] for item in document["failed"]] == [7]
    (sources / "7.msh").write_bytes(small_msh)
    assert api.post(f"{location}/retry").status_code == 202
    assert counts(ended(api, location, drawer)) == {"succeeded": 10}
    refused = api.post(f"{location}/retry")
    assert refused.status_code == 409 and "nothing to retry" in refused.json()["detail"]


def test_an_item_whose_drawing_fails_keeps_the_reason(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    location = submitted(api, items=list(numbered(2)), on_existing="replace")
    until(lambda: drawer.queued(), "the decode is queued")
    attempt = drawer.begin()
    assert attempt is not None
    until(lambda: counts(state(api, location)) == {"running": 2}, "the items are running")
    attempt.fail("timed out after 3600 s")
    document = ended(api, location, drawer)
    assert {item["problem"]["type"] for item in document["failed"]} == {
        "urn:afterimage:problem:decode-failed"
    }
    assert document["failed"][0]["problem"]["detail"] == "timed out after 3600 s"
    assert api.post(f"{location}/retry").status_code == 202
    assert counts(ended(api, location, drawer)) == {"succeeded": 2} and len(drawer.drawn) == 1


def test_canceling_stops_what_has_not_begun(
    api: httpx.Client, drawer: Drawer, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "WINDOW", 4)
    items = [{**item, "seed": n} for n, item in enumerate(numbered(10))]
    location = submitted(api, items=items)
    until(lambda: len(drawer.queued()) == 4, "the window is full")
    attempt = drawer.begin()
    other = drawer.queued()[0]
    assert attempt is not None
    drawer.jobs.subscribe(other, "someone", 60)  # who wants the same picture
    assert api.delete(location).status_code == 202
    until(lambda: counts(state(api, location)) == {"running": 1, "canceled": 9}, "the cancellation")
    assert drawer.queued() == [other]
    assert drawer.jobs.has_subscribers(attempt.id)
    drawer.finish(attempt)
    until(lambda: state(api, location)["status"] == "canceled", "the end")
    document = state(api, location)
    assert counts(document) == {"succeeded": 1, "canceled": 9}
    assert api.delete(location).status_code == 409
    assert drawer.work() and not drawer.work()
    assert len(list((sources.parent / "out").glob("*.png"))) == 1


def test_a_batch_of_many_equal_pictures_writes_every_target(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    """More than a decode has targets of one caller."""
    items = [{"source": "store:in/0.msh", "target": f"store:out/{n}.png"} for n in range(40)]
    document = ended(api, submitted(api, items=items), drawer)
    assert counts(document) == {"succeeded": 40} and len(drawer.drawn) == 1
    assert len(list((sources.parent / "out").glob("*.png"))) == 40


def test_the_end_of_a_batch_is_an_event_and_a_webhook(
    api: httpx.Client, app: httpx.Client, drawer: Drawer, sources: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (sources / "1.msh").unlink()
    services = app._transport._transport.app.state.services  # type: ignore[attr-defined]
    monkeypatch.setattr(
        services.webhooks, "webhook_secret", type(services.webhooks.webhook_secret)(SECRET)
    )
    monkeypatch.setattr(services.webhooks, "webhook_allow", "127.0.0.1:1")
    location = submitted(api, items=list(numbered(2)), webhook=["http://127.0.0.1:1/hook"])
    ended(api, location, drawer)
    lines = api.get(f"{location}/events").text
    assert lines.count("event: ended") == 1
    message = Outbox(drawer.jobs.store).claim(60)
    assert message is not None and message.job == location.rpartition("/")[2]
    assert '"type":"batch.ended"' in message.body
    assert '"succeeded":1' in message.body and '"failed":1' in message.body
    Outbox(drawer.jobs.store).delivered(message)
    assert Outbox(drawer.jobs.store).claim(60) is None
    assert api.post(f"{location}/retry").status_code == 202
    ended(api, location, drawer)
    assert Outbox(drawer.jobs.store).claim(60) is not None


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_metrics_count_items_by_status(
    api: httpx.Client, drawer: Drawer, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "WINDOW", 2)
    (sources / "0.msh").unlink()
    location = submitted(api, items=[{**item, "seed": n} for n, item in enumerate(numbered(10))])
    until(lambda: len(drawer.queued()) == 2, "the window is full")
    drawer.work()
    until(lambda: counts(state(api, location)).get("succeeded") == 1, "the first one is done")
    page = api.get("/metrics").text
    assert 'afterimage_batch_items{status="succeeded"} 1.0' in page
    assert 'afterimage_batch_items{status="failed"} 1.0' in page
    assert 'afterimage_batch_items_ended_total{status="failed"} 1.0' in page
    assert "afterimage_batches_running 1.0" in page
    ended(api, location, drawer)
    page = api.get("/metrics").text
    assert 'afterimage_batch_items_ended_total{status="succeeded"} 9.0' in page
    assert "afterimage_batch_stalled_seconds 0.0" in page


def test_the_same_idempotency_key_adds_one_batch(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    body = {"items": list(numbered(2)), "steps": 1}
    sent = [api.post("/v1/batches", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert sent[0].headers["location"] == sent[1].headers["location"]
    assert len(Batches(drawer.jobs.store).running()) == 1
    other = api.post("/v1/batches", json={**body, "seed": 1}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 422 and other.json()["type"].endswith("key-reused")


def test_batches_are_listed_in_pages_newest_first(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    assert api.get("/v1/batches").json() == {"batches": [], "next": None}
    (sources / "0.msh").unlink()
    ids = [submitted(api, items=[*numbered(n)]).rpartition("/")[2] for n in (1, 2, 3)]
    ended(api, f"/v1/batches/{ids[0]}", drawer)
    first = api.get("/v1/batches", params={"limit": 2}).json()
    assert [batch["id"] for batch in first["batches"]] == ids[:0:-1]
    assert first["next"] == f"/v1/batches?after={ids[1]}&limit=2"
    last = api.get(first["next"]).json()
    assert last["next"] is None
    (oldest,) = last["batches"]
    assert oldest == api.get(f"/v1/batches/{ids[0]}", params={"limit": 0}).json()
    assert (oldest["status"], oldest["counts"]["failed"], oldest["failed"]) == ("ended", 1, [])
    unknown = api.get("/v1/batches", params={"after": "0" * 32})
    assert unknown.status_code == 404 and "after: there is no batch" in unknown.json()["detail"]


def test_expired_batches_are_not_listed_and_forgotten(
    api: httpx.Client, drawer: Drawer, sources: Path
) -> None:
    store = drawer.jobs.store
    former = submitted(api, items=[*numbered(1)]).rpartition("/")[2]
    ended(api, f"/v1/batches/{former}", drawer)
    store.queue.delete(*Batches(store).keys_of(former)[:5])
    assert api.get("/v1/batches").json()["batches"] == []
    second = submitted(api, items=[*numbered(2)]).rpartition("/")[2]
    assert [batch["id"] for batch in api.get("/v1/batches").json()["batches"]] == [second]
    for key in store.queue.keys("*batches-*"):
        assert store.queue.zrange(key, 0, -1) == [second.encode()]


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"items": []}, 422, "items"),
        ({}, 422, "either items, or the prefixes"),
        ({"source": "store:in/"}, 422, "either items, or the prefixes"),
        ({"items": list(numbered(1)), "target": "store:out/"}, 422, "either items"),
        ({"source": "store:in", "target": "store:out/"}, 422, "source"),
        ({"source": "store:in/a", "target": "store:out/"}, 422, "slash"),
        ({"source": "store:none/", "target": "store:out/"}, 404, "'none'"),
        ({"source": "store:in/", "target": "store:in/"}, 403, "may not be written"),
        ({"source": "store:out/", "target": "store:out/", "suffix": ".png"}, 422, "replace"),
        ({"items": [*numbered(2), *numbered(1)]}, 422, "items 0 and 2 have the same target"),
        ({"items": [{"source": "store:in/a", "target": "store:out/a"}]}, 422, "items.0.target"),
        ({"items": [{"source": "store:in/a", "target": "store:in/a.png"}]}, 403, "written"),
        ({"items": [{"source": "in/a", "target": "store:out/a.png"}]}, 422, "items.0.source"),
        ({"items": [{"source": "store:in/a"}]}, 422, "items.0.target"),
        ({"items": list(numbered(1)), "tier": "instant"}, 422, "no diffusion tier"),
        ({"items": list(numbered(1)), "realism": 2}, 422, "realism"),
        ({"items": list(numbered(1)), "colour": 1}, 422, "colour"),
        ({"items": list(numbered(1)), "webhook": ["https://a.example"]}, 422, "SECRET is not set"),
    ],
)
def test_a_wrong_request_is_refused(
    api: httpx.Client, jobs: Jobs, request_: dict[str, Any], status: int, said: str
) -> None:
    answer = api.post("/v1/batches", json=request_)
    assert answer.status_code == status and said in answer.json()["detail"], answer.text
    assert Batches(jobs.store).running() == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "there is '' in place of {"),
        (b"[]", "there is '[' in place of {"),
        (b'{"items": [{"source": "store:in/a.msh"', "JSON"),
        (b'{"items": []} {}', "more after the object, at character 14"),
        (b'{"tier": "\xff"}', "JSON"),
        (b'{"items": [], "eta": NaN}', "NaN is no number"),
        (b'{"items": [' + b"[" * 10**5, "recursion"),
        (b'{"items": {"source": "store:in/a.msh"}}', "items: Input should be a valid list"),
    ],
)
def test_a_body_that_is_no_request_is_refused(api: httpx.Client, body: bytes, said: str) -> None:
    answer = api.post("/v1/batches", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and said in answer.json()["detail"], answer.text


def test_items_of_every_slice_are_checked(api: httpx.Client, jobs: Jobs) -> None:
    """The list is read in slices of 1000 items."""
    wrong: list[dict[str, Any]] = list(numbered(2400))
    wrong[2345] = {"source": "store:in/a.msh", "target": 3}
    same = [*numbered(2399), *numbered(1)]
    for items, said in ((wrong, "items.2345.target"), (same, "items 0 and 2399 have the same")):
        answer = api.post("/v1/batches", json={"items": items, "steps": 1})
        assert answer.status_code == 422 and said in answer.json()["detail"], answer.text
    assert Batches(jobs.store).running() == []


def test_100_000_items_wait_in_20_mb_of_redis(
    api: httpx.Client, jobs: Jobs, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of 36 random digits, which hardly compress; and the memory of this process."""
    monkeypatch.setattr(feeder, "WINDOW", 0)
    queue = jobs.store.queue
    before, names = queue.info("memory")["used_memory"], random.Random(0)
    items = []
    for n in range(100_000):
        name = f"library/{names.getrandbits(128):032x}-{n:06d}"
        items.append({"source": f"store:in/{name}.msh", "target": f"store:out/{name}.webp"})
    location = submitted(api, items=items)
    held = queue.info("memory")["used_memory"] - before
    keys = [key for key in queue.keys("*batch*") if queue.type(key) != b"zset"]
    usage = sum(queue.memory_usage(key, samples=0) or 0 for key in keys)
    assert usage / 100_000 < 60 and held < 20e6, (usage, held)
    began = time.perf_counter()
    assert counts(state(api, location)) == {"waiting": 100_000}
    assert time.perf_counter() - began < 1
    assert not jobs.line.job_ids()
    assert api.delete(location).status_code == 202
    until(lambda: counts(state(api, location)) == {"canceled": 100_000}, "the cancellation")
