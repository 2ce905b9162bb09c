"""What an operator sees: metrics, request ids, one log of API and worker."""

import json
import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Service, free_port, run_service, wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def samples(service: Service) -> dict[str, float]:
    """Name and labels -> value."""
    text = service.client.get("/metrics").text
    return {
        s.name + json.dumps(s.labels, sort_keys=True): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def until_measured(service: Service, jobs: int) -> None:
    """What a job took is noted after its end."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = samples(service).items()
        work = sum(v for name, v in found if name.startswith("afterimage_megapixel_steps_total{"))
        if work > (jobs - 0.5) * 0.06:
            return
        time.sleep(0.1)
    pytest.fail(f"{jobs} jobs were not measured")


def test_a_decode_is_seen_in_metrics_and_in_one_log_by_its_ids(
    tmp_path: Path, small_msh: bytes
) -> None:
    with run_service(tmp_path, AFTERIMAGE_LOG="json") as service:
        client = service.client
        asked = {"tier": "perceptual"}
        for _ in range(2):  # the second job can be predicted by the first
            asked["seed"] = str(int(asked.get("seed", "0")) + 1)
            answer = client.post(
                "/v1/decodes", params=asked, content=small_msh, headers={"X-Request-Id": "mine-1"}
            )
            assert answer.headers["x-request-id"] == "mine-1"
            wait_for(client, answer.headers["location"])
            until_measured(service, int(asked["seed"]))
        job_id = answer.headers["location"].rpartition("/")[2]
        made = client.get("/livez", headers={"X-Request-Id": "no good"}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
        for _ in range(100):  # what was predicted is noted last
            found = samples(service)
            if any("eta_error_ratio_count" in name and n for name, n in found.items()):
                break
            time.sleep(0.1)

        def total(name: str) -> float:
            return sum(value for key, value in found.items() if key.startswith(name + "{"))

        assert total("afterimage_request_duration_seconds_count") > 3
        assert total("afterimage_stage_duration_seconds_count") == 4
        assert total("afterimage_redis_up") == 1
        assert total("afterimage_queue_depth") == total("afterimage_jobs_running") == 0
        assert total("afterimage_jobs_ended_total") == 2
        assert total("afterimage_model_seconds_total") > 0
        assert total("afterimage_megapixel_steps_total") == pytest.approx(2 * 0.015 * 4)
        assert total("afterimage_eta_error_ratio_count") == 1
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line[0] == "{"]
    ours = [line for line in lines if line.get("job_id") == job_id]
    assert {line["logger"] for line in ours} >= {"afterimage.access", "worker.tasks"}
    assert {line.get("request_id") for line in ours if line["logger"] == "worker.tasks"} == {
        "mine-1"
    }


def test_metrics_may_have_a_port_of_their_own(tmp_path: Path) -> None:
    import httpx

    port = free_port()
    with run_service(tmp_path, "--workers", "0", AFTERIMAGE_METRICS_PORT=str(port)) as service:
        assert service.client.get("/metrics").status_code == 404
        assert "afterimage_redis_up" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
