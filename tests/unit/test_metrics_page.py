"""The metrics page, read by the Prometheus parser, with a real Redis."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from models.tiers import Settings
from service import metrics
from service.requests import RequestMiddleware
from service.routes import metrics as metrics_page
from tests.support.service import free_port
from worker.attempt import Attempt
from worker.queue import counters, workers
from worker.queue.jobs import Jobs
from worker.queue.records import DecodeRequest
from worker.queue.store import Store, connect
from worker.settings import WorkerSettings

SETTINGS = Settings(sampler="ddim", steps=4, eta=0.0, gamma=1.0)


def decode(seed: int) -> DecodeRequest:
    return DecodeRequest("d" * 64, "fast", SETTINGS, seed, "c" * 16, "e" * 16, 2, 64, 64)


def application(jobs: Jobs) -> FastAPI:
    app = FastAPI()
    app.include_router(metrics_page.router)
    app.add_api_route("/v1/things/{id}", lambda id: id)
    app.add_middleware(RequestMiddleware)
    app.state.services = SimpleNamespace(jobs=jobs)
    return app


def get(app: FastAPI, path: str = "/metrics", method: str = "GET") -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)

    return asyncio.run(once())


def parse(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    """The value of the only sample with this name and these labels; 0 without one."""
    values = [
        s.value
        for family in families.values()
        for s in family.samples
        if s.name == sample and labels.items() <= s.labels.items()
    ]
    assert len(values) < 2
    return values[0] if values else 0.0


def scrape(store: Store) -> dict[str, Metric]:
    response = get(application(Jobs(store)))
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(response.text)


def test_every_metric_has_a_name_a_type_and_a_help_text(store: Store) -> None:
    jobs = Jobs(store)
    counters.add_model_time(store, "w", 1.0, 1.0)
    app = application(jobs)
    get(app, "/v1/things/1")
    families = {
        name.removeprefix("afterimage_"): family
        for name, family in parse(get(app).text).items()
        if name.startswith("afterimage_") and not name.endswith("_created")
    }
    assert {name: family.type for name, family in families.items()} == {
        "request_duration_seconds": "histogram",
        "stage_duration_seconds": "histogram",
        "cache_lookups": "counter",
        "shed_requests": "counter",
        "rate_limited_requests": "counter",
        "redis_up": "gauge",
        "queue_depth": "gauge",
        "queue_oldest_age_seconds": "gauge",
        "queue_jobs": "gauge",
        "queue_callers": "gauge",
        "queue_unserved_seconds": "gauge",
        "jobs_running": "gauge",
        "workers": "gauge",
        "queue_memory_ratio": "gauge",
        "jobs_ended": "counter",
        "leases_lost": "counter",
        "results_lost": "counter",
        "targets": "counter",
        "batch_items": "gauge",
        "batch_items_ended": "counter",
        "batches_running": "gauge",
        "batch_stalled_seconds": "gauge",
        "eta_error_ratio": "histogram",
        "model_seconds": "counter",
        "megapixel_steps": "counter",
        "model_seconds_per_megapixel_step": "gauge",
    }
    assert all(family.documentation.endswith(".") for family in families.values())


def test_requests_are_counted_by_route_method_and_status_class(store: Store) -> None:
    app = application(Jobs(store))
    before = parse(get(app).text)
    for path, method in [("/v1/things/1", "GET"), ("/v1/things/2", "GET"),
                         ("/x/1", "GET"), ("/x/2", "BREW")]:  # fmt: skip
        get(app, path, method)
    after = parse(get(app).text)
    name = "afterimage_request_duration_seconds_count"

    def increase(**labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert increase(route="/v1/things/{id}", method="GET", status="2xx") == 2
    assert increase(route="unmatched", method="GET", status="4xx") == 1
    assert increase(route="unmatched", method="other", status="4xx") == 1


def test_stage_durations_are_in_seconds(store: Store) -> None:
    before = scrape(store)
    metrics.stages({"parse": 1.0, "g_s": 250.0})
    after = scrape(store)
    name = "afterimage_stage_duration_seconds"
    for stage, seconds in {"parse": 0.001, "g_s": 0.25}.items():
        spent = value(after, f"{name}_sum", stage=stage) - value(before, f"{name}_sum", stage=stage)
        assert spent == pytest.approx(seconds)
    within = {"stage": "g_s", "le": "0.25"}
    assert value(after, f"{name}_bucket", **within) > value(before, f"{name}_bucket", **within)


def test_cache_lookups_shed_and_rate_limited_requests_are_counted(store: Store) -> None:
    before = scrape(store)
    metrics.cache("draft", True)
    metrics.cache("picture", False)
    metrics.shed("backlog")
    metrics.rate_limited()
    after = scrape(store)
    for name, labels in [
        ("afterimage_cache_lookups_total", {"cache": "draft", "result": "hit"}),
        ("afterimage_cache_lookups_total", {"cache": "picture", "result": "miss"}),
        ("afterimage_shed_requests_total", {"reason": "backlog"}),
        ("afterimage_rate_limited_requests_total", {}),
    ]:
        assert value(after, name, **labels) - value(before, name, **labels) == 1


def test_the_queue_is_read_at_every_scrape(store: Store) -> None:
    jobs = Jobs(store)
    empty = scrape(store)
    assert value(empty, "afterimage_redis_up") == 1
    assert value(empty, "afterimage_queue_depth") == 0
    assert value(empty, "afterimage_queue_oldest_age_seconds") == 0
    assert value(empty, "afterimage_workers") == 0
    workers.mark_alive(jobs)
    for seed in range(3):
        jobs.submit(decode(seed), b"bitstream")
    store.queue.hset(jobs.key(decode(1).id), "created", str(time.time() - 100))
    assert Attempt.begin(jobs, decode(0).id)
    store.queue.lrem(jobs.queue.key, 0, decode(0).id)
    families = scrape(store)
    assert value(families, "afterimage_queue_depth") == 2
    assert value(families, "afterimage_queue_oldest_age_seconds") == pytest.approx(100, abs=5)
    assert value(families, "afterimage_jobs_running") == 1
    assert value(families, "afterimage_workers") == 1
    before = store.queue.config_get("maxmemory")["maxmemory"] or "0"
    try:
        store.queue.config_set("maxmemory", 2 * store.queue.info("memory")["used_memory"])
        half = value(scrape(store), "afterimage_queue_memory_ratio")
    finally:
        store.queue.config_set("maxmemory", before)
    assert half == pytest.approx(0.5, abs=0.1)


def test_waiting_jobs_and_callers_are_counted_by_priority(store: Store) -> None:
    jobs = Jobs(store)
    for seed in range(3):
        jobs.submit(decode(seed), b"bitstream", "app")
        jobs.submit(decode(seed + 3), b"bitstream", f"library-{seed}", priority="batch")
    store.queue.zadd(f"{store.prefix}:line:since:batch", {"library-1": time.time() - 100})
    store.queue.hset(jobs.key(decode(3).id), "created", str(time.time() - 9000))
    families = scrape(store)
    for name, interactive, batch in (
        ("jobs", 3, 3),
        ("callers", 1, 3),
        ("unserved_seconds", 0, 100),
    ):
        for priority, expected in (("interactive", interactive), ("batch", batch)):
            found = value(families, f"afterimage_queue_{name}", priority=priority)
            assert found == pytest.approx(expected, abs=5)
    assert value(families, "afterimage_queue_oldest_age_seconds") < 100  # of interactive jobs


def test_a_queued_job_without_a_record_is_still_counted(store: Store) -> None:
    jobs = Jobs(store)
    jobs.submit(decode(0), b"bitstream")
    store.queue.delete(jobs.key(decode(0).id))
    assert value(scrape(store), "afterimage_queue_depth") == 1


def test_counters_of_workers_are_exported(store: Store) -> None:
    with store.queue.pipeline() as pipe:
        counters.add(store, pipe, counters.LEASES_LOST)
        counters.add(store, pipe, counters.SUCCEEDED, 2)
        counters.add(store, pipe, counters.FAILED)
        pipe.execute()
    families = scrape(store)
    assert value(families, "afterimage_leases_lost_total") == 1
    ended = {s: value(families, "afterimage_jobs_ended_total", status=s)
             for s in ("succeeded", "failed", "canceled")}  # fmt: skip
    assert ended == {"succeeded": 2, "failed": 1, "canceled": 0}
    assert 0 < store.queue.ttl(counters.key(store))


def test_the_error_of_predicted_times_is_a_histogram(store: Store) -> None:
    for measured_s, predicted_s in [(9, 10), (10, 10), (30, 10), (1000, 10), (5, 0)]:
        counters.add_eta_ratio(store, measured_s, predicted_s)  # the last job had no prediction
    families = scrape(store)
    name = "afterimage_eta_error_ratio"
    counts = {le: value(families, f"{name}_bucket", le=le) for le in ("0.75", "0.9", "1.0", "4.0")}
    assert counts == {"0.75": 0, "0.9": 1, "1.0": 2, "4.0": 3}
    assert value(families, f"{name}_bucket", le="+Inf") == value(families, f"{name}_count") == 4
    assert value(families, f"{name}_sum") == pytest.approx(0.9 + 1 + 3 + 100)


def test_the_cost_of_the_model_is_exported_for_each_worker(store: Store) -> None:
    counters.add_model_time(store, "host-1", 3.0, 2.0)
    counters.add_model_time(store, "host-1", 1.0, 2.0)
    counters.add_model_time(store, 'odd:"\n', 5.0, 1.0)
    families = scrape(store)
    name = "afterimage_model_seconds_per_megapixel_step"
    assert value(families, name, worker="host-1") == 1.0
    assert value(families, name, worker='odd:"\n') == 5.0
    assert value(families, "afterimage_model_seconds_total", worker="host-1") == 4.0
    assert value(families, "afterimage_megapixel_steps_total", worker="host-1") == 4.0


def test_counters_of_workers_expire(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    counters.add_model_time(store, "old", 1.0, 1.0)
    monkeypatch.setattr(counters, "WORKER_TTL_S", 0.05)
    time.sleep(0.1)
    counters.add_model_time(store, "new", 1.0, 1.0)
    assert list(counters.read(store).model_time) == ["new"]


def unreachable() -> Store:
    """Stores whose Redis is not running."""
    return connect(WorkerSettings(REDIS_URL="redis://127.0.0.1:9", CACHE_REDIS_URL=""))


def test_without_redis_the_metrics_of_the_process_remain() -> None:
    metrics.rate_limited()
    families = scrape(unreachable())
    assert value(families, "afterimage_redis_up") == 0
    assert "afterimage_queue_depth" not in families
    assert value(families, "afterimage_rate_limited_requests_total") >= 1
    assert value(families, "process_resident_memory_bytes") > 0


def test_without_redis_counters_of_workers_are_dropped_without_an_error() -> None:
    counters.add_model_time(unreachable(), "w", 1.0, 1.0)
    counters.add_eta_ratio(unreachable(), 1.0, 1.0)


def test_the_separate_port_is_released_when_the_server_stops(store: Store) -> None:
    port = free_port()
    for _ in range(2):
        stop = metrics.serve(port, Jobs(store), "127.0.0.1")
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        finally:
            stop()
        assert value(parse(text), "afterimage_redis_up") == 1


def test_the_page_is_documented_in_openapi(store: Store) -> None:
    operation = application(Jobs(store)).openapi()["paths"]["/metrics"]["get"]
    assert operation["summary"] == "Metrics" and "Prometheus" in operation["description"]
    assert list(operation["responses"]["200"]["content"]) == ["text/plain"]
