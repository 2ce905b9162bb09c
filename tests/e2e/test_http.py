"""The API as its users meet it: HTTP, real Redis, real worker, shipped weights."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from models import image
from models.codec import bitstream
from tests.support.data import DATA, psnr
from tests.support.service import Service
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]

PROBLEM = "application/problem+json"
FILES = {"application/x-npy", "application/octet-stream"}


def pixels(answer: httpx.Response) -> image.Pixels:
    assert answer.headers["content-type"] == "image/png"
    return image.read(answer.content, 10**6)


def test_a_committed_stream_decodes_to_the_cards_psnr(
    service: Service, photo: image.Pixels
) -> None:
    """kodim23 at quality 2: the figure stands in the card of the codec's weights."""
    card = (DATA.parents[1] / "models/weights/msh.md").read_text()
    found = re.search(r"kodim23\.msh`: ([\d.]+) dB", card)
    assert found
    answer = service.client.post("/v1/decodes", content=(DATA / "kodim23.msh").read_bytes())
    assert answer.status_code == 200
    assert psnr(pixels(answer), photo) == pytest.approx(float(found[1]), abs=0.1)


def test_a_photograph_becomes_bytes_then_a_draft_then_the_perceptual_picture(
    service: Service, photo: image.Pixels
) -> None:
    client, small = service.client, photo[101:201, 200:350].copy()
    encoded = client.post("/v1/encodes", params={"quality": 2}, content=image.write(small, "png"))
    assert encoded.status_code == 200
    bpp = 8 * len(encoded.content) / small[..., 0].size
    assert float(encoded.headers["x-afterimage-bpp"]) == pytest.approx(bpp, abs=1e-3)

    draft = client.post("/v1/decodes", params={"tier": "perceptual"}, content=encoded.content)
    assert draft.status_code == 200
    assert draft.headers["x-afterimage-tier"] == "instant"
    location = draft.headers["location"]
    assert draft.headers["link"] == f'<{location}/image>; rel="upgrade"'
    assert psnr(pixels(draft), small) > 26

    state = wait_for(client, location)
    assert (state["status"], state["step"], state["total"]) == ("succeeded", 4, 4)
    final = client.get(f"{location}/image")
    assert final.headers["x-afterimage-tier"] == "perceptual"
    assert "immutable" in final.headers["cache-control"]
    drawn = final.headers["x-afterimage-drawn"]
    assert 'sampler="ddim", steps=4, ' in drawn and ', seed="0", codec="' in drawn
    assert "x-afterimage-drawn" not in draft.headers
    assert final.headers["etag"] == f'"{hashlib.sha256(final.content).hexdigest()}"'
    assert psnr(pixels(final), small) > 22
    assert not np.array_equal(pixels(final), pixels(draft))
    with Image.open(io.BytesIO(final.content)) as picture:
        assert "synthesised detail" in picture.info["Comment"]

    repeat = client.post("/v1/decodes", params={"tier": "perceptual"}, content=encoded.content)
    assert repeat.headers["x-cache"] == "hit"
    assert repeat.content == final.content
    assert client.get(location).json()["attempts"] == 1


def test_a_draft_is_served_until_the_upgrade_is_there(service: Service, small_msh: bytes) -> None:
    client = service.client
    asked = {"tier": "ddim-100", "seed": 3}
    draft = client.post("/v1/decodes", params=asked, content=small_msh)
    location = draft.headers["location"]
    meanwhile = client.get(f"{location}/image")
    assert meanwhile.headers["x-afterimage-tier"] == "instant"
    assert np.array_equal(pixels(meanwhile), pixels(draft))
    assert "max-age=0" in meanwhile.headers["cache-control"]
    seen = set()
    deadline = time.monotonic() + 120
    while (state := client.get(location).json())["status"] in {"queued", "running"}:
        seen.add(state["step"])
        assert time.monotonic() < deadline
    assert state["status"] == "succeeded"
    assert len(seen) > 3  # progress was visible
    again = client.get(f"{location}/image", headers={"If-None-Match": draft.headers["etag"]})
    assert again.status_code == 200
    assert again.headers["x-afterimage-tier"] == "ddim-100"
    same = client.get(f"{location}/image", headers={"If-None-Match": again.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")


def test_seeds_are_different_pictures_and_equal_requests_one_job(
    service: Service, small_msh: bytes
) -> None:
    client = service.client

    def post(seed: int) -> str:
        asked = {"tier": "ddim-10", "seed": seed, "steps": 2}
        location: str = client.post("/v1/decodes", params=asked, content=small_msh).headers[
            "location"
        ]
        return location

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        locations = list(pool.map(post, [1, 1, 1, 1, 2, 2, 2, 2]))
    assert len(set(locations)) == 2
    pictures = []
    for location in sorted(set(locations)):
        assert wait_for(client, location)["attempts"] == 1
        pictures.append(pixels(client.get(f"{location}/image")))
    assert not np.array_equal(*pictures)


def test_both_formats_and_multipart_are_understood(
    service: Service, small_msh: bytes, small_compressai: bytes
) -> None:
    client = service.client
    answers = [
        client.post("/v1/decodes", content=small_msh),
        client.post("/v1/decodes", content=small_compressai),
        client.post("/v1/decodes", files={"file": ("a.msh", small_msh)}),
    ]
    assert [a.status_code for a in answers] == [200] * 3
    form, sent = answers[2].request.headers["content-type"], answers[2].request.read()
    for charset, status in (("UTF-8", 200), ("undefined", 400), ("punycode", 400)):
        headers = {"Content-Type": f"{form}; charset={charset}"}
        again = client.post("/v1/decodes", content=sent, headers=headers)
        assert again.status_code == status, charset
    assert np.array_equal(pixels(answers[0]), pixels(answers[2]))
    assert np.abs(pixels(answers[0]).astype(int) - pixels(answers[1])).max() <= 2


def test_the_answer_says_where_its_time_went(service: Service, photo: image.Pixels) -> None:
    new = image.write(photo[:70, :70].copy(), "png")
    data = service.client.post("/v1/encodes", content=new).content
    found = []
    for _ in range(2):
        timing = service.client.post("/v1/decodes", content=data).headers["server-timing"]
        found.append([part.split(";")[0].strip() for part in timing.split(",")])
    assert found == [["parse", "queue", "entropy", "g_s", "encode"], ["parse"]]


def test_compressai_files_can_be_written(service: Service, small: image.Pixels) -> None:
    client = service.client
    asked = {"format": "compressai", "quality": 1}
    made = client.post("/v1/encodes", params=asked, content=image.write(small, "png")).content
    found = client.post("/v1/inspect", content=made).json()
    assert (found["format"], found["profile"], found["quality"]) == ("compressai", "float", 1)
    assert client.post("/v1/decodes", content=made).status_code == 200


def test_inspect_tells_what_the_header_says(service: Service, small_msh: bytes) -> None:
    found = service.client.post("/v1/inspect", content=small_msh).json()
    assert (found["width"], found["height"], found["bytes"]) == (150, 100, len(small_msh))
    assert found["decodable"] is True
    cost = found["costs"]["ddpm-1000"]
    assert (cost["steps"], cost["megapixel_steps"]) == (1000, 15)


def test_inspect_says_what_a_picture_will_cost_once_that_was_measured(
    service: Service, small_msh: bytes
) -> None:
    client = service.client
    location = client.post("/v1/decodes?tier=ddim-10&seed=5", content=small_msh).headers["location"]
    wait_for(client, location)
    deadline = time.monotonic() + 20
    while (costs := client.post("/v1/inspect", content=small_msh).json()["costs"])["ddim-100"][
        "seconds"
    ] is None:
        assert time.monotonic() < deadline  # what a job took is noted after its end
        time.sleep(0.1)
    assert 0 < costs["instant"]["seconds"] < costs["ddim-100"]["seconds"]
    hundred, thousand = (costs[name]["seconds"] for name in ("ddim-100", "ddpm-1000"))
    assert hundred < thousand <= 10 * hundred + 0.01  # a part of it may be fixed


def test_a_job_beyond_the_limit_is_refused(service: Service) -> None:
    data = (DATA / "kodim23.msh").read_bytes()
    answer = service.client.post("/v1/decodes?tier=ddpm-1000", content=data)
    assert answer.status_code == 422
    assert "393 megapixel-steps; the limit is 300" in answer.json()["detail"]


def test_every_model_has_a_digest_and_a_card(service: Service) -> None:
    for model in service.client.get("/v1/models").json():
        file = DATA.parents[1] / "models/weights" / f"{model['name']}.safetensors"
        assert model["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        card = service.client.get(model["card"])
        assert card.headers["content-type"].startswith("text/markdown")
        assert f"`{model['name']}.safetensors`" in card.text
    unknown = service.client.get(f"/v1/models/{'0' * 16}/card")
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
    service: Service, small_msh: bytes, small: image.Pixels, name: str, status: int, kind: str
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
        answer = service.client.post("/v1/decodes", params={"tier": tier}, content=data)
        assert answer.status_code == status
        assert answer.headers["content-type"] == PROBLEM
        assert answer.headers["cache-control"] == "no-store"
        problem = answer.json()
        assert problem["type"] == f"urn:afterimage:problem:{kind}"
        assert problem["status"] == status
        assert len(problem["detail"]) > 10
        assert "location" not in answer.headers


def test_corrupt_entropy_coded_bytes_are_never_a_picture(
    service: Service, small_compressai: bytes
) -> None:
    b = bitstream.parse(small_compressai)
    strings = [(small_compressai.index(string), len(string)) for string in (b.y_string, b.z_string)]
    for at in [start + length // part for start, length in strings for part in (4, 2)]:
        bad = bytearray(small_compressai)
        bad[at] ^= 0x55
        answer = service.client.post("/v1/decodes", content=bytes(bad))
        assert answer.status_code == 422
        assert answer.json()["type"].endswith(("corrupt-stream", "desynchronised-stream"))


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
    service: Service, small_msh: bytes, query: str, said: str
) -> None:
    answer = service.client.post(f"/v1/decodes?{query}", content=small_msh)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == PROBLEM
    assert said in answer.json()["detail"]


def test_pictures_that_cannot_be_encoded(service: Service, small: image.Pixels) -> None:
    client = service.client
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


def test_a_body_over_the_limit_is_refused_before_it_is_read(service: Service) -> None:
    url = service.client.base_url
    declared = http.client.HTTPConnection(url.host, url.port or 80, timeout=10)
    declared.putrequest("POST", "/v1/decodes")
    declared.putheader("Content-Length", str(2**40))
    declared.endheaders()  # no body follows: the answer must not wait for one
    assert declared.getresponse().status == 413
    declared.close()

    def chunks():  # type: ignore[no-untyped-def]
        for _ in range(40):
            yield bytes(2**20)

    assert service.client.post("/v1/decodes", content=chunks()).status_code == 413


@contextlib.contextmanager
def upload(service: Service, size: int, now: int) -> Iterator[socket.socket]:
    """A request whose body is begun."""
    url = service.client.base_url
    with socket.create_connection((url.host, url.port)) as own:
        head = f"POST /v1/decodes HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n"
        own.sendall(head.encode() + bytes(now))
        yield own


def test_an_upload_that_is_given_up_is_one_line_in_the_log(service: Service) -> None:
    before = len(service.log.read_text())
    with upload(service, 1000, 10):
        time.sleep(0.3)
    until(lambda: "POST /v1/decodes 499" in service.log.read_text()[before:], "the line", 20)
    assert "Traceback" not in service.log.read_text()[before:]


def test_bodies_take_no_more_memory_than_one_of_the_largest(service: Service) -> None:
    def other(size: int = 2_000_000) -> int:
        return service.client.post("/v1/inspect", content=bytes(size)).status_code

    with upload(service, 3_900_000, 2_500_000):
        until(lambda: other() == 503, "no room is left", 3)
        assert other(60_000) == 415  # there is always some for bitstreams
    until(lambda: other() == 415, "there is room again", 20)


def test_a_body_that_does_not_come_is_408(service: Service) -> None:
    url = service.client.base_url
    slow = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    slow.putrequest("POST", "/v1/decodes")
    slow.putheader("Content-Length", "1000")
    slow.endheaders(b"a few bytes, and then no more")
    answer = slow.getresponse()
    assert (answer.status, answer.getheader("Content-Type")) == (408, PROBLEM)
    assert b"only 29 bytes of the body arrived within 3 s" in answer.read()
    slow.close()


@pytest.mark.parametrize("id", ["0" * 31, "A" * 32, "\U0001f426", "nothing"])
def test_what_is_no_id_is_refused(service: Service, id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry"), ("GET", "/events")):
        answer = service.client.request(method, f"/v1/decodes/{id}{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
        assert answer.json()["errors"][0]["parameter"] == "id"


@pytest.mark.parametrize("path", ["", "/image"])
def test_an_unknown_decode_is_not_found(service: Service, path: str) -> None:
    answer = service.client.get(f"/v1/decodes/{'0' * 32}{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)


def test_unknown_paths_and_methods_are_problems(service: Service) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/v1/inspect", 405)):
        answer = service.client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    answer = service.client.patch(f"/v1/decodes/{'0' * 32}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, PUT")
    answer = service.client.post("/")
    assert (answer.status_code, answer.headers["allow"]) in {
        (405, m) for m in ("GET, HEAD", "HEAD, GET")
    }


def test_without_named_origins_no_other_page_may_call_the_api(service: Service) -> None:
    headers = {"Origin": "https://gallery.example", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "x-api-key, prefer"
    answer = service.client.options("/v1/decodes", headers=headers)
    assert "access-control-allow-origin" not in answer.headers


def test_probes_answer(service: Service) -> None:
    answer = service.client.get("/livez")
    assert answer.json()["status"] == "ok"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert service.client.get("/readyz").json() == {"status": "ok", "redis": "up"}


def test_the_documentation_needs_no_other_host(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert "swagger" in page.text
    assert not re.findall(r"https?://", page.text)


def test_openapi_has_examples_and_describes_every_problem(service: Service) -> None:
    schema = service.client.get("/openapi.json").json()
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
            if method in {"post", "put"} and operation["operationId"] not in {"retry", "share"}:
                assert "application/octet-stream" in operation["requestBody"]["content"] or (
                    "image/png" in operation["requestBody"]["content"]
                )


def _examples(schema: Any, content: Any) -> list[Any]:
    """The examples of one kind of answer: its own, or those of the model that it is, or lists."""
    if "example" in content:
        return [content["example"]]
    if "examples" in content:
        return [e["value"] for e in content["examples"].values()]
    model = content.get("schema", {})
    model = model.get("items", model)
    if "$ref" in model:
        model = schema["components"]["schemas"][model["$ref"].rpartition("/")[2]]
    return list(model.get("examples", []))


def test_tiers_are_listed(service: Service) -> None:
    tiers = {t["name"]: t for t in service.client.get("/v1/tiers").json()}
    assert tiers["instant"]["sampler"] is None
    assert (tiers["ddpm-1000"]["sampler"], tiers["ddpm-1000"]["steps"]) == ("ddpm", 1000)
