"""The service conforms to its OpenAPI document: all checks of schemathesis."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models import image
from tests.support.api_keys import TOKENS
from tests.support.service import Service
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]

HERE = Path(__file__).parent
NEED_MORE = {
    "PUT /v1/decodes/{id}",  # its id is a digest of the rest
    "DELETE /v1/decodes/{id}", "GET /v1/decodes/{id}/preview",  # they need a running job
    "POST /v1/batches", "GET /v1/batches/{id}", "DELETE /v1/batches/{id}",  # they need stores
    "GET /v1/batches/{id}/events", "POST /v1/batches/{id}/retry",
    "DELETE /v1/queue/jobs/{id}",  # a queued or running job
    "DELETE /v1/queue/quarantine/{digest}",  # a quarantined bitstream
    "POST /v1/queue/workers/{name}/drain",  # the hooks name no worker that exists
}  # fmt: skip
"""Operations at which random requests rarely succeed; tested in `test_decodes`, `test_batches`,
`test_operators`."""
LIMIT_S = 600
"""Seconds after which a run has hung; it takes about 80."""


@pytest.fixture(scope="module")
def client(guarded: Service) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": TOKENS["operator"]}
    with httpx.Client(base_url=guarded.client.base_url, headers=headers, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def bodies(
    client: httpx.Client, photo: image.Pixels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Small bitstreams and pictures, in folders by media type."""
    root, cut = tmp_path_factory.mktemp("bodies"), photo[100:164, 200:270].copy()
    for format, kind in image.MEDIA_TYPES.items():
        if kind.startswith("image/"):
            (root / kind).mkdir(parents=True)
            (root / kind / "cut").write_bytes(image.write(cut, format))
    streams = root / "application/octet-stream"
    streams.mkdir(parents=True)
    for container in ("msh", "compressai"):
        asked = {"format": container}
        made = client.post("/v1/encodes", params=asked, content=image.write(cut, "png"))
        (streams / container).write_bytes(made.content)
    return root


@pytest.fixture(scope="module")
def decodes(client: httpx.Client, bodies: Path) -> list[str]:
    """Locations of decodes: two have succeeded, two were withdrawn."""
    stream = (bodies / "application/octet-stream/msh").read_bytes()
    found = []
    for seed, steps in enumerate((2, 2, 200, 200)):
        asked: dict[str, str | int] = {"tier": "ddim-10", "steps": steps, "seed": seed}
        answer = client.post("/v1/decodes", params=asked, content=stream)
        found.append(str(answer.headers["location"]))
        if steps > 2:
            client.delete(found[-1])
        wait_for(client, found[-1])
    return found


def test_the_service_conforms_to_its_schema(
    client: httpx.Client, bodies: Path, decodes: list[str], tmp_path: Path
) -> None:
    """Examples, boundary values, random and wrong requests, and sequences of them, by a key with
    all scopes."""
    environment = {
        "AFTERIMAGE_BODIES": str(bodies),
        "AFTERIMAGE_IDS": " ".join(at.rpartition("/")[2] for at in decodes),
        "AFTERIMAGE_TOKEN": TOKENS["operator"],
        "SCHEMATHESIS_HOOKS": "schema_hooks",
        "PYTHONPATH": str(HERE),
    }
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file", str(HERE / "schemathesis.toml"), "run", f"{client.base_url}/openapi.json",
        "--continue-on-failure", "--max-examples", "10", "--seed", "1", "--request-timeout", "30",
        "--report", "ndjson", "--report-ndjson-path", str(tmp_path / "events"), "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    accepted = answered_well(tmp_path / "events")
    paths = client.get("/openapi.json").json()["paths"]
    described = {f"{method.upper()} {at}" for at, methods in paths.items() for method in methods}
    assert described - accepted <= NEED_MORE
    assert not any(worker["drained"] for worker in client.get("/v1/queue").json()["workers"])


def answered_well(events: Path) -> set[str]:
    """Operations for which at least one response was 2xx."""
    found = set()
    for line in events.read_text().splitlines():
        run = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for name, interaction in run.get("interactions", {}).items():
            case, response = run["cases"][name]["value"], interaction["response"]
            if response and 200 <= response["status_code"] < 300:
                found.add(f"{case['method']} {case['path']}")
    return found
