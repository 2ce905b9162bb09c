"""Sources, targets and results in a real S3 server, with faults; API and worker in process."""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import obstore
import pytest

from models import image, library, tiers
from models.codec import bitstream
from models.image import MEDIA_TYPES
from models.tiers import Settings
from service import object_writes
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.api_keys import TOKENS, guarded_settings
from tests.support.jobs import decode_of, take
from tests.support.object_server import BUCKET, KEY_ID, SECRET, FaultProxy, s3_server
from tests.support.waiting import until
from worker import context, deliveries, tasks
from worker.context import WorkerContext
from worker.deliveries import Deliveries
from worker.heartbeat import Heartbeat
from worker.queue import object_stores, results
from worker.queue import store as stores
from worker.queue.jobs import Jobs
from worker.queue.object_stores import ObjectStores
from worker.queue.references import Reference
from worker.queue.store import Store
from worker.queue.targets import LEASE_S, Targets
from worker.spool import Spool

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SLOW_S = 2.5
"""Longer than a request to a store may take in these tests."""
STEPS: dict[str, str | int] = {"tier": "perceptual", "steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the S3 server's bucket."""
    folder = tmp_path_factory.mktemp("s3") / "served"
    (folder / BUCKET / "in").mkdir(parents=True)
    return folder / BUCKET


@pytest.fixture(scope="module")
def proxy(root: Path) -> Iterator[FaultProxy]:
    with s3_server(root.parent) as port:
        proxy = FaultProxy(port, SLOW_S)
        yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def settings(
    redis_urls: tuple[str, str], proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceSettings]:
    """Stores `in`, `out`, `results` in the S3 server, `local` in a folder, `own` of one key."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "local").mkdir()
    options = f'region = "us-east-1", endpoint = "http://127.0.0.1:{proxy.port}", allow_http = true'
    file = folder / "stores.toml"
    file.write_text(
        f"""
        [stores.in]
        url = "s3://{BUCKET}/in"
        options = {{ {options} }}
        [stores.out]
        url = "s3://{BUCKET}/out"
        options = {{ {options} }}
        read = false
        write = true
        [stores.results]
        url = "s3://{BUCKET}"
        options = {{ {options} }}
        write = true
        [stores.local]
        url = "file://{folder}/local"
        write = true
        """
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setattr(object_stores, "REQUEST_S", 2)
        patch.setattr(object_stores, "RETRIES", 1)
        patch.setattr(results, "PAUSE_S", 0)
        yield ServiceSettings(
            REDIS_URL=redis_urls[0], CACHE_REDIS_URL=redis_urls[1], stores=file,
            results="store:results/kept", max_bytes=400_000,
        )  # fmt: skip


@pytest.fixture(scope="module")
def objects(settings: ServiceSettings) -> ObjectStores:
    return object_stores.connect(settings)


@pytest.fixture(scope="module")
def api(settings: ServiceSettings) -> Iterator[httpx.Client]:
    with weights.loaded_once(), run_app(settings) as client:
        yield client


@pytest.fixture(autouse=True)
def without_faults(proxy: FaultProxy) -> None:
    proxy.faults.clear()
    proxy.seen.clear()


@pytest.fixture
def jobs(
    store: Store, settings: ServiceSettings, objects: ObjectStores, without_faults: None, root: Path
) -> Iterator[Jobs]:
    """Jobs in empty stores, with results, which are empty too."""
    kept = [f"kept/{file.name}" for file in root.glob("kept/*")]
    obstore.delete(objects._opened["results"], kept)
    connected = stores.connect(settings, results.connect(settings, objects))
    yield Jobs(connected, timeout_s=3600)
    assert connected.results is not None
    connected.results.close()
    connected.close()


@pytest.fixture(scope="module")
def loaded() -> library.Library:
    with weights.loaded_once():
        return library.load()


@pytest.fixture
def worker(
    jobs: Jobs, loaded: library.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> WorkerContext:
    """The context that makes this process a worker."""
    spool = Spool(tmp_path)
    worker = WorkerContext(jobs, loaded, Heartbeat(jobs, spool, tmp_path), spool, max_pixels=10**6)
    monkeypatch.setattr(context, "_current", worker)
    monkeypatch.setattr(deliveries, "NOT_READY_S", 0.0)
    monkeypatch.setattr(deliveries, "MAX_BACKOFF_S", 0.0)
    return worker


@pytest.fixture
def writer(worker: WorkerContext, objects: ObjectStores) -> Deliveries:
    return Deliveries(worker.jobs, objects, worker.max_pixels)


def draw(worker: WorkerContext) -> None:
    """Run all queued jobs, and write their results."""
    for job_id in worker.jobs.line.job_ids():
        take(worker.jobs, job_id)
        tasks.enhance(job_id)
        worker.run_deferred()
    assert worker.jobs.store.results is not None
    worker.jobs.store.results.close()  # waits until they are written


def write_all(writer: Deliveries) -> None:
    """Write all targets that are due."""
    while writer.deliver_one():
        pass


def put_source(objects: ObjectStores, data: bytes, name: str = "a.msh") -> str:
    return str(_written(objects, Reference("in", name), data))


def _written(objects: ObjectStores, ref: Reference, data: bytes) -> Reference:
    objects.write(ref, data, "application/octet-stream", {})
    return ref


def send(api: httpx.Client, **params: str | int) -> httpx.Response:
    return api.post("/v1/decodes", params={**STEPS, **params})


def detail(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert problem["type"] == f"urn:afterimage:problem:{kind}"
    assert SECRET not in answer.text and "127.0.0.1" not in answer.text
    return str(problem["detail"])


def test_a_picture_is_decoded_from_a_source_to_a_target(
    api: httpx.Client, worker: WorkerContext, writer: Deliveries, objects: ObjectStores,
    root: Path, small_msh: bytes,
) -> None:  # fmt: skip
    source = put_source(objects, small_msh, "sub folder ü.msh")
    accepted = send(api, source=source, target="store:out/first/a.webp", seed=5)
    assert (accepted.status_code, accepted.headers["x-cache"]) == (202, "miss")
    location = accepted.headers["location"]
    assert [t["status"] for t in accepted.json()["targets"]] == ["pending"]
    draw(worker)
    drawn = api.get(location).json()
    assert (drawn["status"], drawn["targets"][0]["etag"]) == ("running", None)
    assert api.get(f"{location}/image").headers["x-afterimage-tier"] == "perceptual"
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(api.get, location, headers={"Prefer": "wait=20"})
        followed = pool.submit(api.get, f"{location}/events")
        write_all(writer)
        done = waiting.result().json()
    assert done["status"] == "succeeded"
    assert followed.result().text.count("event: completed") == 1
    head = objects.head(Reference("out", "first/a.webp"))
    assert head is not None
    assert done["targets"] == [
        {"target": "store:out/first/a.webp", "format": "webp", "status": "written",
         "etag": head.etag, "error": None}
    ]  # fmt: skip
    decode = decode_of(small_msh, Settings("ddim", 1, beta=1), seed=5)
    assert head.attributes == {
        "Content-Type": "image/webp", "decode": done["id"], "format": "webp",
        "bitstream": decode.digest, "tier": "perceptual", "seed": "5", "codec": decode.codec,
        "decoder": decode.decoder,
    }  # fmt: skip
    written = (root / "out/first/a.webp").read_bytes()
    served = api.get(f"{location}/image", headers={"Accept": "image/webp"}).content
    assert np.array_equal(image.read(written, 10**6), image.read(served, 10**6))


@pytest.mark.parametrize("lost", ["nothing", "cache", "everything", "status"])
def test_a_target_that_holds_the_picture_is_a_hit_without_work(
    objects: ObjectStores, api: httpx.Client, worker: WorkerContext, writer: Deliveries,
    proxy: FaultProxy, small_msh: bytes, lost: str,
) -> None:  # fmt: skip
    source, target = put_source(objects, small_msh), f"store:out/hit/{lost}.png"
    accepted = send(api, source=source, target=target)
    draw(worker)
    write_all(writer)
    if lost != "nothing":
        worker.jobs.store.cache.flushall()
    if lost == "everything":
        worker.jobs.store.queue.flushall()
    if lost == "status":  # the picture had expired, and the decode failed when it was repeated
        key = worker.jobs.key(accepted.headers["location"].rpartition("/")[2])
        worker.jobs.store.queue.hset(key, "status", "failed")
    proxy.seen.clear()
    again = send(api, source=source, target=target)
    assert (again.status_code, again.headers["x-cache"]) == (200, "hit")
    assert (again.json()["status"], again.json()["targets"][0]["status"]) == (
        "succeeded",
        "written",
    )
    assert api.get(again.headers["location"]).json()["status"] == "succeeded"
    assert "PUT" not in proxy.seen
    assert not worker.jobs.line.job_ids() and not writer.deliver_one()
    other = send(api, source=source, target=target, seed=9)
    assert (other.status_code, other.headers["x-cache"]) == (202, "miss")


def test_targets_of_two_callers_are_written_and_each_sees_only_its_own(
    objects: ObjectStores, settings: ServiceSettings, worker: WorkerContext, writer: Deliveries,
    root: Path, small_msh: bytes, tmp_path: Path,
) -> None:  # fmt: skip
    keys = Path(guarded_settings(tmp_path)["AFTERIMAGE_API_KEYS"])
    source = put_source(objects, small_msh)
    with weights.loaded_once(), run_app(settings.model_copy(update={"api_keys": keys})) as api:
        first, second, third = (
            {"Authorization": f"Bearer {TOKENS[name]}"} for name in ("both", "decoder", "hasty")
        )

        def post(target: str, headers: dict[str, str]) -> httpx.Response:
            params = {**STEPS, "source": source, "target": target}
            return api.post("/v1/decodes", params=params, headers=headers)

        location = post("store:out/two/a.png", first).headers["location"]
        assert post("store:out/two/b.webp", second).headers["location"] == location
        draw(worker)
        write_all(writer)
        late = post("store:local/late.jpg", third)  # the picture is drawn already
        assert (late.status_code, late.headers["x-cache"]) == (202, "hit")
        assert api.get(location, headers=third).json()["status"] == "running"
        assert api.get(location, headers=first).json()["status"] == "succeeded"
        assert not worker.jobs.line.job_ids()
        write_all(writer)
        seen = [api.get(location, headers=h).json() for h in (first, second, third)]
        targets = [[t["target"] for t in document["targets"]] for document in seen]
        assert targets == [
            ["store:out/two/a.png"], ["store:out/two/b.webp"], ["store:local/late.jpg"]
        ]  # fmt: skip
        assert {document["status"] for document in seen} == {"succeeded"}
    assert image.read((root / "out/two/a.png").read_bytes(), 10**6).shape == (100, 150, 3)
    assert image.read((root / "out/two/b.webp").read_bytes(), 10**6).shape == (100, 150, 3)
    assert worker.jobs.store.queue.hget(worker.jobs.key(seen[0]["id"]), "commits") == b"1"


def test_a_failed_target_of_one_caller_does_not_fail_the_decode_of_another(
    api: httpx.Client, worker: WorkerContext, writer: Deliveries, proxy: FaultProxy,
    small_msh: bytes,
) -> None:  # fmt: skip
    query = {**STEPS, "target": "store:out/refused.png"}
    location = api.post("/v1/decodes", params=query, content=small_msh).headers["location"]
    job_id = location.rpartition("/")[2]
    draw(worker)
    proxy.faults.extend([403])
    write_all(writer)
    mine = api.get(location).json()
    assert mine["status"] == "failed"
    assert mine["error"] == "the object store 'out' refused store:out/refused.png (403)"
    assert "event: failed" in api.get(f"{location}/events").text
    state = worker.jobs.get(job_id)
    assert state is not None and (state.status, state.error) == ("succeeded", "")
    assert api.post("/v1/decodes", params=STEPS, content=small_msh).headers["x-cache"] == "hit"
    assert api.post(f"{location}/retry").json()["status"] == "running"
    write_all(writer)
    assert api.get(location).json()["status"] == "succeeded"
    assert not worker.jobs.line.job_ids()


@pytest.mark.parametrize("fault", [403, 503, "slow"])
def test_a_target_is_accepted_although_its_store_does_not_say_what_is_there(
    api: httpx.Client, jobs: Jobs, proxy: FaultProxy, small_msh: bytes, fault: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The store is away, or its credentials are only for writing."""
    monkeypatch.setattr(object_writes, "HEAD_S", 0.3)
    proxy.faults.extend([fault, fault])
    query = {**STEPS, "target": "store:out/unknown.png", "seed": 7}
    assert api.post("/v1/decodes", params=query, content=small_msh).status_code == 202


@pytest.mark.parametrize("faults", [[503, 503], ["cut"], ["cut", 500, "cut"], [429], ["slow"]])
def test_a_write_is_repeated_until_the_store_takes_it(
    api: httpx.Client, worker: WorkerContext, writer: Deliveries, proxy: FaultProxy, root: Path,
    small_msh: bytes, faults: list[int | str],
) -> None:  # fmt: skip
    name = "-".join(map(str, faults))
    query = {**STEPS, "target": f"store:out/again/{name}.png"}
    location = api.post("/v1/decodes", params=query, content=small_msh).headers["location"]
    draw(worker)
    proxy.faults.extend(faults)

    def written() -> bool:
        writer.deliver_one()
        return bool(api.get(location).json()["status"] == "succeeded")

    until(written, "the target is written", 20)
    assert not proxy.faults
    png = worker.jobs.store.picture(location.rpartition("/")[2])
    assert (root / f"out/again/{name}.png").read_bytes() == png


def test_a_store_that_stays_away_fails_the_target_after_the_time_limit_of_jobs(
    api: httpx.Client, worker: WorkerContext, writer: Deliveries, proxy: FaultProxy,
    small_msh: bytes,
) -> None:  # fmt: skip
    query = {**STEPS, "target": "store:out/away.png"}
    location = api.post("/v1/decodes", params=query, content=small_msh).headers["location"]
    draw(worker)
    proxy.faults.extend([503] * 100)

    def count(status: str) -> float:
        line = f'afterimage_targets_total{{status="{status}"}} '
        (value,) = re.findall(rf"^{re.escape(line)}(.+)$", api.get("/metrics").text, re.M)
        return float(value)

    before = {status: count(status) for status in ("retried", "failed")}
    writer.deliver_one()
    assert api.get(location).json()["status"] == "running"
    assert count("retried") == before["retried"] + 1
    worker.jobs.timeout_s = -1
    until(lambda: (writer.deliver_one(), api.get(location).json()["error"])[1], "it fails", 20)
    error = str(api.get(location).json()["error"])
    assert error.startswith("the object store 'out' answered 503; try again later; gave up after")
    assert count("failed") == before["failed"] + 1


def test_a_worker_killed_between_the_write_and_its_record_does_no_damage(
    api: httpx.Client, worker: WorkerContext, writer: Deliveries, root: Path, small_msh: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    query = {**STEPS, "target": "store:out/killed.png"}
    location = api.post("/v1/decodes", params=query, content=small_msh).headers["location"]
    draw(worker)

    def dying(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Targets, "settle", dying)
        writer.deliver_one()
    before = (root / "out/killed.png").read_bytes()
    assert api.get(location).json()["status"] == "running"
    assert not writer.deliver_one()  # the lease of the dead worker lasts
    due = worker.jobs.targets.due
    entries: Any = worker.jobs.store.queue.zrange(due, 0, -1, withscores=True)
    ((member, at),) = entries
    worker.jobs.store.queue.zadd(due, {member: at - LEASE_S})
    assert writer.deliver_one()
    assert api.get(location).json()["status"] == "succeeded"
    assert (root / "out/killed.png").read_bytes() == before
    assert not worker.jobs.store.queue.exists(due)


def test_an_instant_picture_and_a_bitstream_are_written_before_the_response(
    api: httpx.Client, jobs: Jobs, objects: ObjectStores, root: Path, small: image.Pixels,
    small_msh: bytes,
) -> None:  # fmt: skip
    photo = put_source(objects, image.write(small, "png"), "photo.png")
    coded = api.post("/v1/encodes", params={"source": photo, "target": "store:out/p.msh"})
    assert coded.status_code == 200, coded.text
    assert float(coded.headers["x-afterimage-bpp"]) > 0
    file = (root / "out/p.msh").read_bytes()
    assert coded.json() == {
        "target": "store:out/p.msh", "media_type": "application/octet-stream",
        "bytes": len(file), "etag": objects.head(Reference("out", "p.msh")).etag,  # type: ignore[union-attr]
    }  # fmt: skip
    assert bitstream.parse(file).width == 150
    source = put_source(objects, small_msh)
    params = {"source": source, "target": "store:out/i.avif", "tier": "instant"}
    made = api.post("/v1/decodes", params=params)
    assert (made.status_code, made.json()["media_type"]) == (200, "image/avif")
    assert (root / "out/i.avif").stat().st_size == made.json()["bytes"]
    params |= {"target": "store:out/other.dat", "format": "png"}
    assert api.post("/v1/decodes", params=params).json()["media_type"] == MEDIA_TYPES["png"]
    assert (root / "out/other.dat").read_bytes() == api.post(
        "/v1/decodes", params={"source": source}
    ).content  # fmt: skip


@pytest.mark.parametrize(
    ("params", "status", "kind", "said"),
    [
        ({"source": "store:in/none.msh"}, 404, "object-not-found", "store:in/none.msh"),
        ({"source": "store:none/a.msh"}, 404, "store-not-found", "'none'"),
        ({"source": "store:out/a.msh"}, 403, "store-forbidden", "may not be read"),
        ({"source": "store:in/large.msh"}, 413, "body-too-large", "400000 bytes"),
        ({"source": "store:in/photo.png"}, 415, "unsupported-codec", "PNG"),
        ({"source": "store:in/empty.msh"}, 400, "malformed-header", "empty"),
        ({"source": "store:in/../out/a.msh"}, 422, "parameter-error", "'..'"),
        ({"source": "s3://pictures/in/a.msh"}, 422, "parameter-error", "store:NAME/KEY"),
        ({"target": "store:in/a.png"}, 403, "store-forbidden", "may not be written"),
        ({"target": "store:none/a.png"}, 404, "store-not-found", "'none'"),
        ({"target": "store:out/a.gif"}, 422, "parameter-error", ".webp"),
        ({"target": "store:out//a.png"}, 422, "parameter-error", "empty part"),
        ({"format": "png"}, 422, "parameter-error", "only with target"),
    ],
)
def test_a_wrong_source_or_target_is_refused(
    objects: ObjectStores, api: httpx.Client, jobs: Jobs, small: image.Pixels, small_msh: bytes,
    params: dict[str, str], status: int, kind: str, said: str,
) -> None:  # fmt: skip
    put_source(objects, small_msh)
    put_source(objects, bytes(400_001), "large.msh")
    put_source(objects, b"", "empty.msh")
    put_source(objects, image.write(small, "png"), "photo.png")
    for tier in ("instant", "perceptual"):
        query = {"source": "store:in/a.msh", **params, "tier": tier}
        assert said in detail(api.post("/v1/decodes", params=query), status, kind)
    assert not jobs.line.job_ids()


def test_a_body_besides_a_source_is_refused(
    objects: ObjectStores, api: httpx.Client, small_msh: bytes
) -> None:
    for path in ("/v1/decodes", "/v1/encodes"):
        params = {"source": put_source(objects, small_msh)}
        answer = api.post(path, params=params, content=small_msh)
        assert "a source and a body" in detail(answer, 400, "unexpected-body")


@pytest.mark.parametrize(
    ("faults", "status", "kind", "said"),
    [
        ([403], 502, "store-refused", "'in' refused store:in/a.msh (403)"),
        ([503] * 9, 503, "store-away", "'in' answered 503"),
        (["slow"] * 9, 503, "store-away", "'in' did not answer in time"),
    ],
)
def test_a_source_that_cannot_be_read_is_an_error_of_the_store(
    objects: ObjectStores, api: httpx.Client, proxy: FaultProxy, small_msh: bytes,
    faults: list[int | str], status: int, kind: str, said: str,
) -> None:  # fmt: skip
    source = put_source(objects, small_msh)
    proxy.faults.extend(faults)
    answer = api.post("/v1/decodes", params={"source": source})
    proxy.faults.clear()
    assert said in detail(answer, status, kind)
    assert api.post("/v1/decodes", params={"source": source}).status_code == 200


@pytest.mark.parametrize("lost", ["cache", "everything"])
@pytest.mark.parametrize("reader", ["API", "worker"])
def test_results_outlive_the_cache_and_are_not_drawn_again(
    api: httpx.Client, worker: WorkerContext, root: Path, small_msh: bytes, lost: str, reader: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def post() -> httpx.Response:
        return api.post("/v1/decodes", params={**STEPS, "seed": 3}, content=small_msh)

    location = post().headers["location"]
    kept = root / f"kept/{location.rpartition('/')[2]}.png"
    draw(worker)
    drawn = api.get(f"{location}/image").content
    assert kept.read_bytes() == drawn
    worker.jobs.store.cache.flushall()
    if lost == "everything":
        worker.jobs.store.queue.flushall()
    monkeypatch.setattr(library.Library, "diffusion_input", lambda *_: pytest.fail("drawn again"))
    if reader == "worker" and lost == "everything":
        settings = tiers.find("perceptual").settings
        assert settings is not None
        decode = decode_of(small_msh, tiers.vary(settings, steps=1), seed=3)
        assert decode.id == kept.stem
        worker.jobs.submit(decode, small_msh)
        draw(worker)
    elif lost == "everything":
        assert post().headers["x-cache"] == "hit"
    assert api.get(location).json()["status"] == "succeeded"
    assert api.get(f"{location}/image").content == drawn


def test_a_result_that_cannot_be_written_is_counted_and_the_job_succeeds(
    api: httpx.Client, worker: WorkerContext, proxy: FaultProxy, small_msh: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    params = {**STEPS, "seed": 4}
    location = api.post("/v1/decodes", params=params, content=small_msh).headers["location"]
    proxy.faults.extend([404, 403])  # there is none yet, and it cannot be written
    draw(worker)
    assert api.get(location).json()["status"] == "succeeded"

    def lost() -> float:
        lines = api.get("/metrics").text.splitlines()
        line = next(x for x in lines if x.startswith("afterimage_results_lost_total"))
        return float(line.split()[-1])

    assert lost() == 1
    assert "its result is only in the cache: the object store 'results' refused" in caplog.text
