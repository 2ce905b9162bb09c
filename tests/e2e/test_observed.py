"""What operators can observe: metrics, request ids, and the log of API and workers."""

import json
import re
from functools import partial

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models import image
from service.settings import ServiceSettings
from tests.support.api import run_app
from tests.support.service import Service, free_port
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.usefixtures("loaded_once")]


def samples(service: Service) -> dict[str, float]:
    """The samples of `/metrics`: name and labels -> value."""
    text = service.client.get("/metrics").text
    return {
        s.name + json.dumps(s.labels, sort_keys=True): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def total(found: dict[str, float], name: str) -> float:
    """The sum of a metric over all labels."""
    return sum(value for key, value in found.items() if key.startswith(name + "{"))


def test_a_decode_appears_in_metrics_and_with_its_ids_in_one_log(
    service: Service, photo: image.Pixels
) -> None:
    client = service.client
    cut = photo[60:160, 300:450].copy()
    stream = client.post("/v1/encodes", content=image.write(cut, "png")).content

    def idle() -> bool:
        waiting = ("afterimage_queue_depth", "afterimage_jobs_running")
        return not any(total(samples(service), name) for name in waiting)

    until(idle, "the end of other tests' jobs", 20)
    before = samples(service)

    def more(name: str) -> float:
        """The increase of a counter."""
        return total(samples(service), name) - total(before, name)

    def measured(jobs: int) -> bool:
        """True once the durations of so many jobs are recorded, which is after their ends."""
        return more("afterimage_megapixel_steps_total") > (jobs - 0.5) * work

    work = 0.192 * 0.128  # one step of the coded sides
    for seed in (1, 2):  # the second job can be predicted by the first
        params = {"tier": "perceptual", "seed": seed}
        answer = client.post(
            "/v1/decodes", params=params, content=stream, headers={"X-Request-Id": "mine-1"}
        )
        assert answer.headers["x-request-id"] == "mine-1"
        wait_for(client, answer.headers["location"])
        until(partial(measured, seed), "its measure", 20)
    job_id = answer.headers["location"].rpartition("/")[2]
    made = client.get("/livez", headers={"X-Request-Id": "no good"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    until(lambda: more("afterimage_eta_error_ratio_count") >= 1, "what was predicted", 20)
    assert more("afterimage_request_duration_seconds_count") > 3
    assert more("afterimage_stage_duration_seconds_count") == 4
    assert total(samples(service), "afterimage_redis_up") == 1
    assert idle()
    assert more("afterimage_jobs_ended_total") == 2
    assert more("afterimage_model_seconds_total") > 0
    assert more("afterimage_megapixel_steps_total") == pytest.approx(2 * work)
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line[0] == "{"]
    ours = [line for line in lines if line.get("job_id") == job_id]
    assert {line["logger"] for line in ours} >= {"afterimage.access", "worker.tasks"}
    assert {line.get("request_id") for line in ours if line["logger"] == "worker.tasks"} == {
        "mine-1"
    }


def test_metrics_may_have_a_separate_port(redis_urls: tuple[str, str]) -> None:
    port = free_port()
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache, metrics_port=port)
    with run_app(settings) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/metrics").status_code == 404
        assert "afterimage_redis_up" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
