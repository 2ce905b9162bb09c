"""The API in this process, over real stores and the shipped weights, without workers.

`tests/e2e` has the same API as a process: sockets, streams, limits, drawing.
"""

import base64
import hashlib
import re
import struct
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from models import image
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from tests.support.data import DATA, psnr
from tests.support.jobs import take
from tests.support.waiting import until
from worker.attempt import Attempt
from worker.queue import order
from worker.queue.jobs import Jobs
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]

PROBLEM = "application/problem+json"
FILES = {"application/x-npy", "application/octet-stream"}


def pixels(answer: httpx.Response) -> image.Pixels:
    assert answer.headers["content-type"] == "image/png"
    return image.read(answer.content, 10**6)


def test_the_bitstream_in_tests_data_decodes_to_the_psnr_in_the_model_card(
    api: httpx.Client, photo: image.Pixels
) -> None:
    """kodim23 at quality 2: the figure stands in the card of the codec's weights."""
    card = (DATA.parents[1] / "models/weights/msh.md").read_text()
    found = re.search(r"kodim23\.msh`: ([\d.]+) dB", card)
    assert found
    answer = api.post("/v1/decodes", content=(DATA / "kodim23.msh").read_bytes())
    assert answer.status_code == 200
    assert psnr(pixels(answer), photo) == pytest.approx(float(found[1]), abs=0.1)


def test_compressai_files_can_be_written(api: httpx.Client, small: image.Pixels) -> None:
    client = api
    asked: dict[str, str | int] = {"format": "compressai", "quality": 1}
    made = client.post("/v1/encodes", params=asked, content=image.write(small, "png")).content
    found = client.post("/v1/inspect", content=made).json()
    assert (found["format"], found["profile"], found["quality"]) == ("compressai", "float", 1)
    assert client.post("/v1/decodes", content=made).status_code == 200


def test_inspect_returns_the_fields_of_the_header(api: httpx.Client, small_msh: bytes) -> None:
    found = api.post("/v1/inspect", content=small_msh).json()
    assert (found["width"], found["height"], found["bytes"]) == (150, 100, len(small_msh))
    assert found["decodable"] is True
    cost = found["costs"]["ddpm-1000"]
    assert (cost["steps"], cost["megapixel_steps"]) == (1000, 15)


def test_every_model_has_a_digest_and_a_card(api: httpx.Client) -> None:
    for model in api.get("/v1/models").json():
        file = DATA.parents[1] / "models/weights" / f"{model['name']}.safetensors"
        assert model["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        card = api.get(model["card"])
        assert card.headers["content-type"].startswith("text/markdown")
        assert f"`{model['name']}.safetensors`" in card.text
    unknown = api.get(f"/v1/models/{'0' * 16}/card")
    assert (unknown.status_code, unknown.headers["content-type"]) == (404, PROBLEM)


def giant() -> bytes:
    return struct.pack(">BBIIBIII", 3, 1, 65535, 65535, 8, 1024, 1024, 2) + bytes(64)


@pytest.mark.parametrize(
    ("name", "status", "kind"),
    [
        ("empty", 400, "malformed-header"),
        ("header cut", 400, "malformed-header"),
        ("payload cut", 422, "length-mismatch"),
        ("z string cut", 422, "checksum-mismatch"),
        ("byte changed", 422, "checksum-mismatch"),
        ("random", 415, "unsupported-codec"),
        ("65535x65535", 413, "picture-too-large"),
        ("picture", 415, "unsupported-codec"),
    ],
)
def test_wrong_bytes_get_a_clear_problem(
    api: httpx.Client, small_msh: bytes, small: image.Pixels, name: str, status: int, kind: str
) -> None:
    data = {
        "empty": b"",
        "header cut": small_msh[:20],
        "payload cut": small_msh[:100],
        "z string cut": small_msh[:-1],
        "byte changed": small_msh[:200] + bytes([small_msh[200] ^ 1]) + small_msh[201:],
        "random": bytes([200]) + np.random.default_rng(0).bytes(3000),
        "65535x65535": giant(),
        "picture": image.write(small, "png"),
    }[name]
    for tier in ("instant", "perceptual"):
        answer = api.post("/v1/decodes", params={"tier": tier}, content=data)
        assert answer.status_code == status
        assert answer.headers["content-type"] == PROBLEM
        assert answer.headers["cache-control"] == "no-store"
        problem = answer.json()
        assert problem["type"] == f"urn:afterimage:problem:{kind}"
        assert problem["status"] == status
        assert len(problem["detail"]) > 10
        assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tier=best", "perceptual"),
        ("seed=-1", "seed"),
        ("seed=18446744073709551616", "seed"),
        ("tier=ddim-10&steps=0", "steps"),
        ("tier=ddim-10&eta=2", "eta"),
        ("tier=ddim-10&eta=nan", "eta"),
        ("tier=ddpm-100&eta=0.5", "eta"),
    ],
)
def test_wrong_parameters_are_named(
    api: httpx.Client, small_msh: bytes, query: str, said: str
) -> None:
    answer = api.post(f"/v1/decodes?{query}", content=small_msh)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == PROBLEM
    assert said in answer.json()["detail"]


def test_pictures_that_cannot_be_encoded_are_refused(
    api: httpx.Client, small: image.Pixels
) -> None:
    client = api
    large = image.write(np.zeros((1001, 1000, 3), np.uint8), "png")
    for data, status in (
        (b"", 422),
        (b"hello", 415),
        (large, 413),
        (image.write(small, "png")[:99], 422),
    ):
        answer = client.post("/v1/encodes", content=data)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert client.post("/v1/encodes?quality=4", content=b"").status_code == 422
    assert client.post("/v1/encodes?format=jpeg", content=b"").status_code == 422


@pytest.mark.parametrize("id", ["0" * 31, "A" * 32, "\U0001f426", "nothing"])
def test_an_invalid_id_is_refused(api: httpx.Client, id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry"), ("GET", "/events")):
        answer = api.request(method, f"/v1/decodes/{id}{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
        assert answer.json()["errors"][0]["parameter"] == "id"


@pytest.mark.parametrize("path", ["", "/image"])
def test_an_unknown_decode_is_not_found(api: httpx.Client, path: str) -> None:
    answer = api.get(f"/v1/decodes/{'0' * 32}{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)


@pytest.mark.parametrize("query", [True, False])
def test_an_event_stream_is_resumed_after_the_last_event(
    api: httpx.Client, small_msh: bytes, query: bool
) -> None:
    """Polyfills of EventSource send the id in the query, since they cannot set headers."""
    job = api.post("/v1/decodes?tier=perceptual&seed=77", content=small_msh).headers["location"]
    api.delete(job)
    events = api.get(f"{job}/events").text
    first = re.findall("^id: (.*)$", events, re.MULTILINE)[0]
    params = {"lastEventId": first} if query else None
    headers = None if query else {"Last-Event-ID": first}
    rest = api.get(f"{job}/events", params=params, headers=headers).text
    assert f"id: {first}\n" in events
    assert f"id: {first}\n" not in rest
    assert "event: canceled" in rest


def test_unknown_paths_and_methods_are_problems(api: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/v1/inspect", 405)):
        answer = api.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    answer = api.patch(f"/v1/decodes/{'0' * 32}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD, PUT")
    for path in ("/", "/docs", "/openapi.json", "/livez", "/web/page.css", "/v1/tiers"):
        answer = api.post(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    answer = api.get("/v1/inspect")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_head_is_answered_wherever_get_is(api: httpx.Client) -> None:
    templates = api.get("/openapi.json").json()["paths"]
    documented = [path for path, operations in templates.items() if "get" in operations]
    assert not [path for path, operations in templates.items() if "head" in operations]
    for template in ("/", "/docs", "/redoc", "/openapi.json", "/web/page.css", *documented):
        path = template.replace("{id}", "0" * 32).replace("{weights_id}", "0" * 16)
        get, head = api.get(path), api.head(path)
        assert head.status_code == get.status_code != 405, path
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.content == b"" != get.content


def test_a_slash_at_the_end_is_ignored_and_never_redirected(
    api: httpx.Client, small_msh: bytes
) -> None:
    assert api.post("/v1/decodes/", content=small_msh).status_code == 200
    for path in ("/v1/tiers/", "/docs/", "/livez/"):
        assert api.get(path).status_code == 200
    for path in ("/v1/tiers//", "/web", "/web/", "/v1"):
        assert api.get(path, follow_redirects=False).status_code == 404


def below(page: str, reference: str) -> str:
    """Resolve a reference as the client of a proxy; return the path that the proxy sends on."""
    path = urllib.parse.urlsplit(urllib.parse.urljoin(f"https://host/after{page}", reference)).path
    assert path.startswith("/after/"), reference
    return path.removeprefix("/after")


def test_behind_a_proxy_all_references_have_its_prefix(
    redis_urls: tuple[str, str], small_msh: bytes
) -> None:
    queue, cache = redis_urls
    settings = ServiceSettings(
        REDIS_URL=queue, CACHE_REDIS_URL=cache, root_path="/after", link_secret="s" * 32
    )
    with weights.loaded_once(), run_app(settings) as api:
        made = api.post("/v1/decodes?tier=ddim-10&seed=1606", content=small_msh)
        location = below("/v1/decodes", made.headers["location"])
        assert made.headers["link"] == f'</after{location}/image>; rel="upgrade"'
        state = api.get(location).json()
        assert api.get(below(location, state["image"])).status_code == 200
        asynchronous = api.post(
            "/v1/decodes?tier=ddim-10&seed=1606",
            content=small_msh,
            headers={"Prefer": "respond-async"},
        )
        assert asynchronous.json()["image"] == asynchronous.headers["location"] + "/image"
        link = api.post(f"{location}/links").json()["url"]
        assert link.startswith(f"/after{location}/image?")
        assert api.delete(location).json()["image"] == state["image"]
        retried = api.post(f"{location}/retry")
        assert below(location, retried.headers["location"]) == location
        for model in api.get("/v1/models").json():
            assert api.get(below("/v1/models", model["card"])).status_code == 200
        for page in ("/", "/docs", "/redoc"):
            for reference in re.findall(r'(?:src|href)="([^"]+)"', api.get(page).text):
                if not reference.startswith("data:"):
                    assert api.get(below(page, reference)).status_code == 200, reference
        assert "'/after/openapi.json'" in api.get("/docs").text
        assert api.get("/openapi.json").json()["servers"] == [{"url": "/after"}]
        assert api.get(f"/after{location}").json()["id"] == state["id"]  # not removed by the proxy


def test_the_documentation_needs_no_other_host(api: httpx.Client) -> None:
    page = api.get("/docs")
    assert page.status_code == 200
    assert "swagger" in page.text
    assert not re.findall(r"https?://", page.text)


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc"])
def test_pages_run_only_their_own_scripts_and_are_in_no_frame(api: httpx.Client, path: str) -> None:
    page = api.get(path)
    policy = page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
    script = re.search(r"script-src ([^;]*);", policy)
    assert script and "unsafe" not in script[1]
    for inline in re.findall("<script>(.*?)</script>", page.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in script[1]


def test_a_rebound_name_is_refused_and_a_listed_one_is_not(
    api: httpx.Client, redis_urls: tuple[str, str]
) -> None:
    rebound = {"Host": "attacker.example"}
    for path in ("/", "/v1/tiers", "/openapi.json", "/web/page.css"):
        refused = api.get(path, headers=rebound)
        assert (refused.status_code, refused.headers["content-type"]) == (421, PROBLEM)
        assert "x-request-id" in refused.headers
    assert api.get("/livez", headers=rebound).status_code == 200
    queue, cache = redis_urls
    settings = ServiceSettings(
        REDIS_URL=queue, CACHE_REDIS_URL=cache, hosts=("attacker.example",), cors_origins=("*",)
    )
    with weights.loaded_once(), run_app(settings) as client:
        assert client.get("/v1/tiers", headers=rebound).status_code == 200


def test_a_form_of_another_site_is_refused(api: httpx.Client, small_msh: bytes) -> None:
    evil = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    text = {"Content-Type": "text/plain"}
    for headers in (evil, evil | text, {"Origin": "https://evil.example"}):
        refused = api.post("/v1/decodes", content=small_msh, headers=headers)
        assert (refused.status_code, refused.headers["content-type"]) == (403, PROBLEM)
    assert api.post("/v1/decodes", content=small_msh, headers=text).status_code == 200
    assert api.get("/v1/tiers", headers=evil).status_code == 200


def test_a_caller_may_follow_only_so_many_jobs_at_once(
    redis_urls: tuple[str, str], small_msh: bytes
) -> None:
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache, waits_at_once=1)
    with weights.loaded_once(), run_app(settings) as api, ThreadPoolExecutor(1) as pool:
        job = api.post("/v1/decodes?tier=perceptual&seed=30", content=small_msh)
        location = job.headers["location"]
        first = pool.submit(api.get, location, headers={"Prefer": "wait=4"})
        time.sleep(0.5)
        refused = api.get(f"{location}/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert "1 event streams and waiting requests" in refused.json()["detail"]
        began = time.monotonic()
        assert api.get(location, headers={"Prefer": "wait=4"}).json()["status"] == "queued"
        assert 0.9 < time.monotonic() - began < 2.5  # waited, but less
        assert first.result().status_code == 200
        api.delete(location)  # ends the stream
        assert "canceled" in api.get(f"{location}/events").text


def finish_first(store: Store, end: Callable[[Attempt], None]) -> None:
    """Play the worker: begin an attempt at the next job, and end it."""
    jobs = Jobs(store)
    until(lambda: order.first(jobs.line, 1, "interactive"), "a job is queued")
    (job_id,) = order.first(jobs.line, 1, "interactive")
    take(jobs, job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    end(attempt)


def test_a_client_that_prefers_to_wait_gets_the_finished_picture_else_the_draft(
    api: httpx.Client, store: Store, small_msh: bytes, small: image.Pixels
) -> None:
    """`Prefer: wait` without `respond-async`."""
    png = image.write(small, "png")

    def post(seed: int, seconds: int) -> httpx.Response:
        return api.post(
            "/v1/decodes", params={"tier": "perceptual", "seed": seed}, content=small_msh,
            headers={"Prefer": f"wait={seconds}"},
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, 40, 30)
        finish_first(store, lambda attempt: attempt.commit(png))
        drawn = waiting.result()
        waiting = pool.submit(post, 41, 30)
        finish_first(store, lambda attempt: attempt.fail("broken"))
        failed = waiting.result()
    began = time.monotonic()
    late = post(42, 1)
    assert 1 <= time.monotonic() - began < 10
    assert (drawn.status_code, drawn.headers["x-afterimage-tier"]) == (200, "perceptual")
    assert (drawn.content, drawn.headers["preference-applied"]) == (png, "wait=30")
    for answer, seconds in ((failed, 30), (late, 1)):
        assert (answer.status_code, answer.headers["x-afterimage-tier"]) == (200, "instant")
        assert answer.headers["preference-applied"] == f"wait={seconds}"
        assert answer.headers["location"].startswith("/v1/decodes/")
    assert late.content == failed.content != png
    assert api.get(late.headers["location"]).json()["status"] == "queued"


def test_openapi_has_examples_and_describes_every_problem(api: httpx.Client) -> None:
    schema = api.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert schema["components"]["schemas"]["Problem"]["examples"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                for kind, content in answer.get("content", {}).items():
                    shown = _examples(schema, content)
                    binary = kind.startswith("image/") or kind in FILES
                    assert shown or binary, (path, kind)
                    if int(status) >= 400:
                        assert kind == PROBLEM
                        assert all(e["status"] == int(status) for e in shown)
            without_body = {"retry", "share", "retry_job", "drain_worker", "retry_batch"}
            if method in {"post", "put"} and operation["operationId"] not in without_body:
                kinds = {"application/octet-stream", "image/png", "application/json"}
                assert kinds & operation["requestBody"]["content"].keys()


def _examples(schema: Any, content: Any) -> list[Any]:
    """The examples of a response's content, otherwise those of its schema's model."""
    if "example" in content:
        return [content["example"]]
    if "examples" in content:
        return [e["value"] for e in content["examples"].values()]
    model = content.get("schema", {})
    model = model.get("items", model)
    if "$ref" in model:
        model = schema["components"]["schemas"][model["$ref"].rpartition("/")[2]]
    return list(model.get("examples", []))


def test_tiers_are_listed(api: httpx.Client) -> None:
    tiers = {t["name"]: t for t in api.get("/v1/tiers").json()}
    assert tiers["instant"]["sampler"] is None
    assert (tiers["ddpm-1000"]["sampler"], tiers["ddpm-1000"]["steps"]) == ("ddpm", 1000)
