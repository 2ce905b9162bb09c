"""The API over HTTP, with a real Redis, a real worker and the shipped weights."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import socket
import time
from collections.abc import Iterator

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
    assert (state["status"], state["step"], state["total"]) == ("succeeded", 1, 1)
    final = client.get(f"{location}/image")
    assert final.headers["x-afterimage-tier"] == "perceptual"
    assert "immutable" in final.headers["cache-control"]
    drawn = final.headers["x-afterimage-drawn"]
    assert 'sampler="ddim", steps=1, ' in drawn and ', seed="0", codec="' in drawn
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


def test_a_draft_is_served_until_the_final_picture_is_ready(
    service: Service, small_msh: bytes
) -> None:
    client = service.client
    asked: dict[str, str | int] = {"tier": "ddim-100", "steps": 40, "seed": 3}
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
        time.sleep(0.03)
    assert state["status"] == "succeeded"
    assert len(seen) > 3  # progress was reported
    again = client.get(f"{location}/image", headers={"If-None-Match": draft.headers["etag"]})
    assert again.status_code == 200
    assert again.headers["x-afterimage-tier"] == "ddim-100"
    same = client.get(f"{location}/image", headers={"If-None-Match": again.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")


def test_seeds_give_different_pictures_and_equal_requests_one_job(
    service: Service, small_msh: bytes
) -> None:
    client = service.client

    def post(seed: int) -> str:
        asked: dict[str, str | int] = {"tier": "ddim-10", "seed": seed, "steps": 2}
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
    first, second = pictures
    assert not np.array_equal(first, second)


def test_both_formats_and_multipart_forms_are_accepted(
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
    for charset in ("UTF-8", "undefined", "punycode"):  # a form's charset has no meaning
        headers = {"Content-Type": f"{form}; charset={charset}"}
        again = client.post("/v1/decodes", content=sent, headers=headers)
        assert again.status_code == 200, charset
    assert np.array_equal(pixels(answers[0]), pixels(answers[2]))
    assert np.abs(pixels(answers[0]).astype(int) - pixels(answers[1])).max() <= 2


def test_the_response_lists_the_time_of_each_stage(service: Service, photo: image.Pixels) -> None:
    new = image.write(photo[:70, :70].copy(), "png")
    data = service.client.post("/v1/encodes", content=new).content
    found = []
    for _ in range(2):
        timing = service.client.post("/v1/decodes", content=data).headers["server-timing"]
        found.append([part.split(";")[0].strip() for part in timing.split(",")])
    assert found == [["parse", "queue", "entropy", "g_s", "encode"], ["parse"]]


def test_inspect_predicts_costs_once_they_were_measured(service: Service, small_msh: bytes) -> None:
    client = service.client
    location = client.post("/v1/decodes?tier=ddim-10&seed=5", content=small_msh).headers["location"]
    wait_for(client, location)
    deadline = time.monotonic() + 20
    while (costs := client.post("/v1/inspect", content=small_msh).json()["costs"])["ddim-100"][
        "seconds"
    ] is None:
        assert time.monotonic() < deadline  # a job's duration is recorded after its end
        time.sleep(0.1)
    assert 0 < costs["instant"]["seconds"] < costs["ddim-100"]["seconds"]
    hundred, thousand = (costs[name]["seconds"] for name in ("ddim-100", "ddpm-1000"))
    assert (
        hundred < thousand <= 10 * hundred + 0.01
    )  # a part of the predicted time may not depend on the steps


def test_a_job_beyond_the_limit_is_refused(service: Service) -> None:
    data = (DATA / "kodim23.msh").read_bytes()
    answer = service.client.post("/v1/decodes?tier=ddpm-1000", content=data)
    assert answer.status_code == 422
    assert "393 megapixel-steps; the limit is 300" in answer.json()["detail"]


def test_corrupt_entropy_coded_bytes_are_never_decoded_to_a_picture(
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


def test_a_body_over_the_limit_is_refused_before_it_is_read(service: Service) -> None:
    url = service.client.base_url
    declared = http.client.HTTPConnection(url.host, url.port or 80, timeout=10)
    declared.putrequest("POST", "/v1/decodes")
    declared.putheader("Content-Length", str(2**40))
    declared.endheaders()  # no body follows: the response must not wait for one
    assert declared.getresponse().status == 413
    declared.close()

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(2**20)

    assert service.client.post("/v1/decodes", content=chunks()).status_code == 413


@contextlib.contextmanager
def upload(service: Service, size: int, now: int) -> Iterator[socket.socket]:
    """Send the beginning of a request's body, and keep the connection open during the block."""
    url = service.client.base_url
    with socket.create_connection((url.host, url.port)) as own:
        head = f"POST /v1/decodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
        own.sendall(head.encode() + bytes(now))
        yield own


def test_an_aborted_upload_is_one_line_in_the_log(service: Service) -> None:
    before = len(service.log.read_text())
    with upload(service, 1000, 10):
        time.sleep(0.3)
    until(lambda: "POST /v1/decodes 499" in service.log.read_text()[before:], "the line", 20)
    assert "Traceback" not in service.log.read_text()[before:]


def test_all_bodies_share_the_memory_budget(service: Service) -> None:
    def other(size: int = 2_000_000) -> int:
        return service.client.post("/v1/inspect", content=b"\xff" * size).status_code

    with upload(service, 3_900_000, 2_500_000):
        time.sleep(0.5)  # an upload that arrives together with another one may itself be refused
        until(lambda: other() == 503, "the memory budget is used up", 3)
        assert other(60_000) == 415  # small bodies do not count
    until(lambda: other() == 415, "the memory budget is free again", 20)


def test_a_body_that_does_not_arrive_gets_408(service: Service) -> None:
    url = service.client.base_url
    slow = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    slow.putrequest("POST", "/v1/decodes")
    slow.putheader("Content-Length", "1000")
    slow.endheaders(b"a few bytes, and then no more")
    answer = slow.getresponse()
    assert (answer.status, answer.getheader("Content-Type")) == (408, PROBLEM)
    assert b"only 29 bytes of the body arrived within 3 s" in answer.read()
    slow.close()


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
