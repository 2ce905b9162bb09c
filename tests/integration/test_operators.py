"""`/v1/queue`: what operators see and may do. The API is in this process, without workers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service import keys
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.jobs import decode_of, take
from worker.attempt import Attempt
from worker.queue import counters, estimates, workers
from worker.queue.jobs import Jobs
from worker.queue.quarantine import MAX_CRASHES
from worker.queue.records import JobState
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]

TABLE = """
[[keys]]
name = "{name}"
sha256 = "{digest}"
scopes = ["{scope}"]
{more}
"""
KEYS = {
    "ops": ("operate", ""),
    "app": ("decode", ""),
    "library": ("decode", 'priority = "batch"\nweight = 2'),
}


@pytest.fixture(scope="module")
def api(
    redis_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        "".join(
            TABLE.format(name=name, digest=keys.digest(f"ai_{name}"), scope=scope, more=more)
            for name, (scope, more) in KEYS.items()
        )
    )
    with weights.loaded_once(), run_app(_settings(redis_urls, file)) as client:
        yield client


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


def _settings(redis_urls: tuple[str, str], file: Path | None = None) -> ServiceSettings:
    queue, cache = redis_urls
    return ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache, api_keys=file)


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer ai_{name}"}


def post(api: httpx.Client, caller: str, data: bytes, seed: int = 0) -> str:
    """Submit a decode; returns its id."""
    answer = api.post(
        "/v1/decodes", params={"tier": "perceptual", "steps": 4, "seed": seed}, content=data,
        headers=key(caller),
    )  # fmt: skip
    assert answer.status_code == 200
    return answer.headers["location"].rpartition("/")[2]


def begin(jobs: Jobs, job_id: str) -> Attempt:
    """Take a job and begin an attempt at it, as a worker does."""
    take(jobs, job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    return attempt


def state(jobs: Jobs, job_id: str) -> JobState:
    found = jobs.get(job_id)
    assert found is not None
    return found


def test_the_view_shows_what_waits_what_runs_and_the_workers(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    workers.mark_alive(jobs, "cpu")
    running = post(api, "app", small_msh)
    attempt = begin(jobs, running)
    attempt.poll(1)
    work = attempt.state.decode.work
    estimates.record_duration(jobs, 2.0, work)
    counters.add_model_time(jobs.store, workers.WORKER_NAME, 2.0, work)
    post(api, "app", small_msh, 1)
    for seed in range(2, 5):
        post(api, "library", small_msh, seed)
    answer = api.get("/v1/queue", headers=key("ops"))
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    shown = answer.json()
    assert (shown["interactive"], shown["batch"]) == (1, 3)
    assert [(w["priority"], w["caller"], w["jobs"]) for w in shown["waiting"]] == [
        ("batch", "library", 3), ("interactive", "app", 1),
    ]  # fmt: skip
    assert all(0 <= w["unserved_s"] < 60 for w in shown["waiting"])
    (job,) = shown["running"]
    assert (job["id"], job["caller"], job["step"], job["total"]) == (running, "app", 1, 4)
    assert job["worker"] == workers.WORKER_NAME and job["eta_s"] == pytest.approx(1.5)
    (worker,) = shown["workers"]
    assert (worker["name"], worker["device"], worker["drained"]) == (
        workers.WORKER_NAME, "cpu", False,
    )  # fmt: skip
    assert worker["megapixel_steps_per_s"] == pytest.approx(work / 2, abs=1e-3)
    assert 0 <= worker["age_s"] < 60
    assert shown["quarantined"] == []


def test_the_priority_and_weight_of_a_key_reach_the_queue(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    found = state(jobs, post(api, "library", small_msh))
    assert (found.caller, found.priority, found.weight) == ("library", "batch", 2.0)


def test_only_keys_with_the_scope_operate_may_see_and_change_the_queue(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    job_id = post(api, "app", small_msh)
    requests = [
        ("GET", "/v1/queue"), ("DELETE", f"/v1/queue/jobs/{job_id}"),
        ("POST", f"/v1/queue/jobs/{job_id}/retry"), ("DELETE", f"/v1/queue/quarantine/{'a' * 64}"),
        ("POST", "/v1/queue/workers/x/drain"),
    ]  # fmt: skip
    for method, path in requests:
        assert api.request(method, path).status_code == 401
        refused = api.request(method, path, headers=key("app"))
        assert refused.status_code == 403
        assert "lacks the scope operate" in refused.json()["detail"]
    assert state(jobs, job_id).status == "queued"
    assert api.post("/v1/decodes", content=small_msh, headers=key("ops")).status_code == 403


def test_an_operator_cancels_queued_and_running_jobs_of_any_caller_and_retries_them(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    queued, running = post(api, "library", small_msh), post(api, "app", small_msh, 1)
    attempt = begin(jobs, running)
    canceled = api.delete(f"/v1/queue/jobs/{queued}", headers=key("ops"))
    assert (canceled.status_code, canceled.json()["status"]) == (200, "canceled")
    assert jobs.line.job_ids() == set()
    assert api.delete(f"/v1/queue/jobs/{queued}", headers=key("ops")).status_code == 409
    stopping = api.delete(f"/v1/queue/jobs/{running}", headers=key("ops"))
    assert (stopping.status_code, stopping.json()["status"]) == (200, "running")
    assert not attempt.poll(1).subscribed  # its worker stops
    assert attempt.cancel()
    again = api.post(f"/v1/queue/jobs/{queued}/retry", headers=key("ops"))
    assert (again.status_code, again.json()["status"]) == (202, "queued")
    found = state(jobs, queued)
    assert (found.caller, found.priority, found.weight) == ("library", "batch", 2.0)
    assert jobs.has_subscribers(queued)
    assert api.post(f"/v1/queue/jobs/{queued}/retry", headers=key("ops")).status_code == 409
    assert api.delete(f"/v1/queue/jobs/{'0' * 32}", headers=key("ops")).status_code == 404


def test_an_operator_releases_a_quarantined_bitstream(
    api: httpx.Client, jobs: Jobs, small_msh: bytes
) -> None:
    digest = decode_of(small_msh).digest
    for seed in range(MAX_CRASHES):
        begin(jobs, post(api, "app", small_msh, seed)).record_crash()
    (entry,) = api.get("/v1/queue", headers=key("ops")).json()["quarantined"]
    assert entry["digest"] == digest
    query: dict[str, str | int] = {"tier": "perceptual", "seed": 7}
    refused = api.post("/v1/decodes", params=query, content=small_msh, headers=key("app"))
    assert refused.status_code == 422
    path = f"/v1/queue/quarantine/{digest}"
    assert api.delete(path, headers=key("ops")).status_code == 200
    assert api.get("/v1/queue", headers=key("ops")).json()["quarantined"] == []
    assert api.delete(path, headers=key("ops")).status_code == 409
    post(api, "app", small_msh, 7)


def test_an_operator_drains_a_worker(api: httpx.Client, jobs: Jobs) -> None:
    workers.mark_alive(jobs)
    path = f"/v1/queue/workers/{workers.WORKER_NAME}/drain"
    answer = api.post(path, headers=key("ops"))
    assert (answer.status_code, answer.json()["drained"]) == (200, True)
    assert api.get("/v1/queue", headers=key("ops")).json()["workers"][0]["drained"]
    unknown = api.post("/v1/queue/workers/nobody/drain", headers=key("ops"))
    assert (unknown.status_code, "no live worker nobody" in unknown.json()["detail"]) == (404, True)


def test_without_keys_only_clients_on_the_same_machine_may_operate_the_queue(
    redis_urls: tuple[str, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with weights.loaded_once(), run_app(_settings(redis_urls)) as api:
        assert api.get("/v1/queue").status_code == 200
        transport = api._transport
        monkeypatch.setattr(transport._transport, "client", ("192.0.2.7", 5000))  # type: ignore[attr-defined]
        refused = api.get("/v1/queue")
        assert refused.status_code == 403
        assert "set AFTERIMAGE_API_KEYS" in refused.json()["detail"]
        assert api.get("/v1/tiers").status_code == 200
