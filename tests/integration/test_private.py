"""A private service shows a decode only to the callers that submitted it."""

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from models import image
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.api_keys import TOKENS, guarded_settings
from tests.support.jobs import FAST, take
from tests.support.service import connected
from worker.attempt import Attempt
from worker.queue.batches.records import Item, Spec
from worker.queue.batches.store import Batches, Packed
from worker.queue.jobs import Jobs
from worker.queue.store import Store
from worker.settings import faults

pytestmark = [pytest.mark.redis, pytest.mark.weights]

OWNER, OTHER = "both", "decoder"
UNKNOWN = "0" * 32
ROUTES = [
    ("GET", ""), ("GET", "/events"), ("GET", "/image"), ("GET", "/preview"), ("POST", "/links"),
    ("POST", "/retry"), ("DELETE", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(
    redis_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> ServiceSettings:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in guarded_settings(tmp_path_factory.mktemp("keys")).items():
            patch.setenv(name, value)
        patch.setenv("AFTERIMAGE_PRIVATE", "1")
        return ServiceSettings(REDIS_URL=redis_urls[0], CACHE_REDIS_URL=redis_urls[1])


@pytest.fixture(scope="module")
def api(settings: ServiceSettings) -> Iterator[httpx.Client]:
    with weights.loaded_once(), run_app(settings) as client:
        yield client


@pytest.fixture
def jobs(redis_urls: tuple[str, str]) -> Iterator[Jobs]:
    """The queue, whose data of other tests stay."""
    with connected(*redis_urls) as store:
        yield Jobs(store)


def by(caller: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[caller]}"}


def submit(api: httpx.Client, caller: str, data: bytes, seed: int) -> str:
    params: dict[str, Any] = {"tier": "ddim-10", "seed": seed}
    answer = api.post("/v1/decodes", params=params, content=data, headers=by(caller))
    assert answer.status_code == 200
    return answer.headers["location"].rpartition("/")[2]


def seen(api: httpx.Client, caller: str, id: str, method: str, path: str) -> tuple[object, ...]:
    """All that a caller sees of an id, but the id itself and those of the request."""
    answer = api.request(method, f"/v1/decodes/{id}{path}", headers=by(caller))
    own = {"x-request-id", "traceparent"}
    headers = {k: v for k, v in answer.headers.items() if k not in own}
    return answer.status_code, answer.text.replace(id, "ID"), headers


def draw(jobs: Jobs, id: str) -> None:
    """Finish a job, as a worker does."""
    take(jobs, id)
    attempt = Attempt.begin(jobs, id)
    assert attempt is not None
    attempt.commit(image.write(np.zeros((100, 150, 3), np.uint8), "png"))


def test_the_decode_of_another_caller_looks_like_an_unknown_one(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    ids = [submit(api, OWNER, small_msh, seed) for seed in (1, 2)]
    draw(jobs, ids[1])
    for method, path in ROUTES:
        missing = seen(api, OTHER, UNKNOWN, method, path)
        assert missing[0] == 404
        assert [seen(api, OTHER, id, method, path) for id in ids] == [missing, missing]
    assert {state.status for id in ids if (state := jobs.get(id))} == {"queued", "succeeded"}


def test_callers_that_submit_the_same_share_the_work_and_both_see_it(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    id = submit(api, OWNER, small_msh, 3)
    assert seen(api, OTHER, id, "GET", "")[0] == 404
    assert submit(api, OTHER, small_msh, 3) == id
    assert [seen(api, caller, id, "GET", "")[0] for caller in (OWNER, OTHER)] == [200, 200]
    assert id in jobs.line.job_ids()
    api.delete(f"/v1/decodes/{id}", headers=by(OTHER))
    assert api.get(f"/v1/decodes/{id}", headers=by(OWNER)).json()["status"] == "queued"
    assert seen(api, "single", id, "GET", "")[0] == 404
    draw(jobs, id)
    params: dict[str, Any] = {"tier": "ddim-10", "seed": 3}
    hit = api.post("/v1/decodes", params=params, content=small_msh, headers=by("single"))
    assert hit.headers["x-cache"] == "hit"
    assert seen(api, "single", id, "GET", "/image?min_tier=ddim-10")[0] == 200


def test_a_put_under_its_id_submits_too(api: httpx.Client, small_msh: bytes) -> None:
    id = submit(api, OWNER, small_msh, 4)
    params: dict[str, Any] = {"tier": "ddim-10", "seed": 4}
    put = api.put(f"/v1/decodes/{id}", params=params, content=small_msh, headers=by(OTHER))
    assert put.status_code == 200
    assert seen(api, OTHER, id, "GET", "")[0] == 200


def test_a_refused_submission_shows_nothing(api: httpx.Client, small_msh: bytes) -> None:
    id = submit(api, OWNER, small_msh, 5)
    params: dict[str, Any] = {"tier": "ddim-10", "seed": 5, "webhook": "https://127.0.0.1/"}
    refused = api.post("/v1/decodes", params=params, content=small_msh, headers=by(OTHER))
    assert refused.status_code == 422
    assert seen(api, OTHER, id, "GET", "")[0] == 404


def test_a_signed_link_shows_the_picture_to_everyone_who_has_it(
    api: httpx.Client, small_msh: bytes
) -> None:
    id = submit(api, OWNER, small_msh, 6)
    link = api.post(f"/v1/decodes/{id}/links", headers=by(OWNER)).json()["url"]
    assert api.get(link).status_code == 200
    assert seen(api, OTHER, id, "GET", "/image")[0] == 404


def test_the_submitters_are_known_after_restarts_and_when_the_picture_has_expired(
    api: httpx.Client, settings: ServiceSettings, jobs: Jobs, small_msh: bytes
) -> None:
    id = submit(api, OWNER, small_msh, 7)
    draw(jobs, id)
    jobs.store.cache.flushall()
    with run_app(settings) as restarted:
        assert seen(restarted, OWNER, id, "GET", "")[0] == 410
        assert seen(restarted, OTHER, id, "GET", "")[0] == 404
        assert seen(restarted, OTHER, id, "POST", "/retry")[0] == 404
        assert seen(restarted, OWNER, id, "POST", "/retry")[0] == 202
        assert seen(restarted, OWNER, id, "GET", "")[0] == 200
        assert seen(restarted, OTHER, id, "GET", "")[0] == 404


def ttls(store: Store, id: str) -> tuple[int, int]:
    """Seconds for which a job's record and its submitters are kept."""
    keys = store.key("job", id), store.key("submitters", id)
    record, submitters = (store.queue.ttl(key) for key in keys)
    return int(record), int(submitters)


def test_the_submitters_are_kept_longer_than_the_record(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    id = submit(api, OWNER, small_msh, 8)
    record, submitters = ttls(jobs.store, id)
    assert 0 < record < submitters
    jobs.store.queue.expire(jobs.store.key("submitters", id), 60)
    draw(jobs, id)
    record, submitters = ttls(jobs.store, id)
    assert 60 < record < submitters


def test_a_private_service_without_keys_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_PRIVATE", "1")
    with pytest.raises(ValidationError) as e:
        ServiceSettings()
    assert "AFTERIMAGE_API_KEYS is not; name the file of API keys" in faults(e.value)


def test_only_its_caller_sees_a_batch_in_the_list(api: httpx.Client, jobs: Jobs) -> None:
    spec = Spec("perceptual", FAST)
    batches = Batches(jobs.store)
    ids = {caller: uuid.uuid4().hex for caller in (OWNER, OTHER)}
    for caller, id in ids.items():
        items = Packed.of([Item("store:in/a.msh", "store:out/a.png", 0)], seed=0)
        batches.create(caller, spec, items, id)
    for caller, id in ids.items():
        listed = api.get("/v1/batches", headers=by(caller)).json()["batches"]
        assert [batch["id"] for batch in listed] == [id]
        other = ids[OTHER if caller == OWNER else OWNER]
        for path in (f"/v1/batches/{other}", f"/v1/batches?after={other}"):
            assert api.get(path, headers=by(caller)).status_code == 404
    assert api.get("/v1/batches").status_code == 401
