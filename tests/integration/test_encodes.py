"""Truncated photographs, and those made to stop the service, sent to the API in this process."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from models import image
from models.codec import bitstream, recovery
from service.settings import ServiceSettings
from tests.support import hostile, weights
from tests.support.api import run_app

pytestmark = [pytest.mark.redis, pytest.mark.weights]

NPY = {"Accept": "application/x-npy"}


@pytest.fixture(scope="module")
def api(redis_urls: tuple[str, str]) -> Iterator[httpx.Client]:
    queue, cache = redis_urls
    settings = ServiceSettings(
        REDIS_URL=queue,
        CACHE_REDIS_URL=cache,
        max_pixels=10**7,
        picture_cpu_s=1,
        request_timeout_s=120,
    )
    with weights.loaded_once(), run_app(settings) as client:
        yield client


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_picture_is_refused_and_others_beside_it_succeed(
    api: httpx.Client, name: str, small: image.Pixels, small_msh: bytes
) -> None:
    with ThreadPoolExecutor(3) as pool:
        attack = pool.submit(api.post, "/v1/encodes", content=hostile.FILES[name]())
        encode = pool.submit(api.post, "/v1/encodes", content=image.write(small, "png"))
        decode = pool.submit(api.post, "/v1/decodes", content=small_msh)
        assert (encode.result().status_code, decode.result().status_code) == (200, 200)
    answer = attack.result()
    assert answer.status_code == 422
    assert answer.json()["type"] == "urn:afterimage:problem:picture-error"
    assert "save it anew" in answer.json()["detail"]


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_half_a_photograph_is_encoded_with_a_warning(
    api: httpx.Client, small: image.Pixels, format: str
) -> None:
    out = io.BytesIO()
    Image.fromarray(small).save(out, format)
    whole, half = out.getvalue(), out.getvalue()[: len(out.getvalue()) // 2]
    answers = [api.post("/v1/encodes?quality=3", content=data) for data in (whole, half)]
    assert [answer.status_code for answer in answers] == [200, 200]
    warnings = [answer.headers.get("x-afterimage-warning") for answer in answers]
    assert warnings == [None, "the picture is truncated: pixels are missing"]
    pictures = [
        np.load(io.BytesIO(api.post("/v1/decodes", content=answer.content, headers=NPY).content))
        for answer in answers
    ]
    top = small.shape[0] // 4
    assert np.abs(pictures[0][:top].astype(int) - pictures[1][:top]).mean() < 3
    assert np.abs(pictures[0][-top:].astype(int) - pictures[1][-top:]).mean() > 10
    document = api.get("/openapi.json").json()["paths"]["/v1/encodes"]["post"]["responses"]["200"]
    assert set(document["headers"]) >= {"X-Afterimage-Bpp", "X-Afterimage-Warning"}


def test_a_photograph_without_pixels_is_refused(api: httpx.Client, small: image.Pixels) -> None:
    answer = api.post("/v1/encodes", content=image.write(small, "png")[:60])
    assert answer.status_code == 422
    assert "truncated" in answer.json()["detail"]


def test_instant_decodes_do_not_wait_for_photographs(api: httpx.Client, small_msh: bytes) -> None:
    attacks = 4
    with ThreadPoolExecutor(attacks) as pool:
        sent = [
            pool.submit(api.post, "/v1/encodes", content=hostile.comments()) for _ in range(attacks)
        ]
        decodes = [api.post("/v1/decodes", content=small_msh).status_code for _ in range(3)]
        assert decodes == [200] * 3
        assert not all(attack.done() for attack in sent)
        assert {attack.result().status_code for attack in sent} == {422}


def test_a_busy_or_dead_recovery_process_is_reported_as_unavailable(
    api: httpx.Client, small_compressai: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known about the bitstream: it may decode at the next try."""
    b = bitstream.parse(small_compressai)
    foreign = bytearray(small_compressai)
    at = foreign.index(b.y_string) + 8
    foreign[at : at + len(b.y_string) - 8] = bytes(reversed(b.y_string[8:]))
    recovery.PROCESS.close()
    monkeypatch.setattr(recovery.PROCESS, "timeout", 1e-3)
    answer = api.post("/v1/decodes", content=bytes(foreign))
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:afterimage:problem:unavailable"
    assert "try again later" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) > 0
    monkeypatch.setattr(recovery.PROCESS, "busy_timeout", 0.1)
    with recovery.PROCESS._lock:
        answer = api.post("/v1/decodes", content=bytes(foreign))
    assert (answer.status_code, "was busy" in answer.json()["detail"]) == (503, True)
