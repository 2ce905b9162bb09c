"""Decodes over HTTP with a real worker, from submission to expiry."""

import base64
import concurrent.futures
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import ExifTags, Image

from models import image
from models.tiers import TIERS
from tests.support.data import psnr
from tests.support.service import Service
from tests.support.waiting import until, wait_for
from worker.queue import counters, estimates
from worker.queue.jobs import Jobs
from worker.queue.records import DecodeRequest, JobState

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SLOW: dict[str, str | int] = {"tier": "ddim-100", "steps": 1000}
"""A job of some seconds at 64×60 pixels."""


@pytest.fixture
def client(service: Service) -> httpx.Client:
    return service.client


@pytest.fixture
def stream(client: httpx.Client, photo: image.Pixels, request: pytest.FixtureRequest) -> bytes:
    """A bitstream that no other test has sent, of 64×60 pixels: a step takes 15 ms."""
    at = int(hashlib.sha256(request.node.name.encode()).hexdigest(), 16)
    top, left = at % 400, at // 400 % 600
    cut = photo[top : top + 60, left : left + 64].copy()
    return client.post("/v1/encodes", content=image.write(cut, "png")).content


def submit(client: httpx.Client, stream: bytes, **params: str | int) -> str:
    answer = client.post("/v1/decodes", params={"tier": "perceptual", **params}, content=stream)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["location"])


def reaches(client: httpx.Client, location: str, status: str) -> float:
    return until(lambda: client.get(location).json()["status"] == status, status)


def events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    """Server-sent events as dictionaries of event, id and data."""
    event: dict[str, object] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name in {"event", "id"}:
            event[name] = value
        elif name == "data":
            event["data"] = json.loads(value)
        elif not line and "event" in event:
            yield event
            event = {}


def test_respond_async_is_answered_at_once(client: httpx.Client, stream: bytes) -> None:
    answer = client.post(
        "/v1/decodes", params=SLOW, content=stream, headers={"Prefer": "respond-async"}
    )
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    assert int(answer.headers["retry-after"]) >= 1
    shown = answer.json()
    assert shown["status"] in {"queued", "running"}
    assert answer.headers["location"] == f"/v1/decodes/{shown['id']}"
    client.delete(answer.headers["location"])


def test_a_client_that_waits_gets_the_finished_picture(client: httpx.Client, stream: bytes) -> None:
    answer = client.post(
        "/v1/decodes",
        params={"tier": "perceptual"},
        content=stream,
        headers=[
            ("Prefer", "respond-async"),
            ("Prefer", "wait=60"),
            ("Accept", "text/html"),
            ("Accept", "image/webp"),
        ],
    )
    assert (answer.status_code, answer.headers["x-afterimage-tier"]) == (200, "perceptual")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["preference-applied"] == "wait=60"


def test_a_waiting_client_is_answered_when_the_decode_is_canceled(
    client: httpx.Client, stream: bytes
) -> None:
    location = submit(client, stream, **SLOW)
    headers = {"Prefer": "respond-async, wait=60"}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            client.post, "/v1/decodes", params=SLOW, content=stream, headers=headers
        )
        reaches(client, location, "running")
        time.sleep(1)
        client.delete(location)
        answer = waiting.result()
    assert (answer.status_code, "canceled" in answer.json()["detail"]) == (409, True)


def test_broken_bytes_are_refused_before_they_are_queued(
    client: httpx.Client, small_compressai: bytes
) -> None:
    broken = bytearray(small_compressai)
    broken[-100] ^= 255
    answer = client.post(
        "/v1/decodes",
        params={"tier": "perceptual"},
        content=bytes(broken),
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 422


def test_a_client_may_put_a_decode_under_the_id_that_it_computed(
    client: httpx.Client, stream: bytes
) -> None:
    weights = {m["name"]: m["weights_id"] for m in client.get("/v1/models").json()}
    settings = TIERS["ddim-10"].settings
    assert settings is not None
    digest = hashlib.sha256(stream).hexdigest()
    ids = weights["msh_q2"], weights["decoder_compact"]
    own = DecodeRequest(digest, "ddim-10", settings, 7, *ids, 2, 64, 60)
    params: dict[str, str | int] = {"tier": "ddim-10", "seed": 7}
    first = client.put(f"/v1/decodes/{own.id}", params=params, content=stream)
    assert (first.status_code, first.headers["x-afterimage-tier"]) == (201, "instant")
    again = client.put(f"/v1/decodes/{own.id}", params=params, content=stream)
    assert again.status_code == 200
    other = client.put(f"/v1/decodes/{own.id}", params={**params, "seed": 8}, content=stream)
    assert (other.status_code, "id-mismatch" in other.json()["type"]) == (422, True)
    instant = client.put(f"/v1/decodes/{own.id}", content=stream)
    assert instant.status_code == 422
    wait_for(client, first.headers["location"])


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "avif", "npy"])
def test_a_picture_is_sent_in_the_accepted_format(
    client: httpx.Client, tiny_msh: bytes, format: image.OutputFormat
) -> None:
    """Both the instant and the finished picture."""
    accept = {"Accept": image.MEDIA_TYPES[format]}
    location = submit(client, tiny_msh)
    wait_for(client, location)
    for answer, reference in (
        (client.post("/v1/decodes", content=tiny_msh, headers=accept),
         client.post("/v1/decodes", content=tiny_msh)),
        (client.get(f"{location}/image", headers=accept), client.get(f"{location}/image")),
    ):  # fmt: skip
        assert answer.headers["content-type"] == image.MEDIA_TYPES[format]
        assert answer.headers["vary"] == "Accept"
        expected = image.read(reference.content, 10**6)
        if format == "npy":
            found = np.load(io.BytesIO(answer.content))
        else:
            found = image.read(answer.content, 10**6)
        assert (
            psnr(found, expected) > 38
            if format in {"jpeg", "avif"}
            else (np.array_equal(found, expected))
        )


def test_an_unsupported_format_gets_406(client: httpx.Client, tiny_msh: bytes) -> None:
    answer = client.post("/v1/decodes", content=tiny_msh, headers={"Accept": "image/tiff"})
    assert (answer.status_code, answer.json()["status"]) == (406, 406)


def test_ranges_of_a_picture_can_be_requested(client: httpx.Client, tiny_msh: bytes) -> None:
    location = submit(client, tiny_msh)
    wait_for(client, location)
    whole = client.get(f"{location}/image")
    size, etag = len(whole.content), whole.headers["etag"]

    def part(value: str, **headers: str) -> httpx.Response:
        return client.get(f"{location}/image", headers={"Range": value, **headers})

    for value, expected in (
        ("bytes=0-99", whole.content[:100]),
        ("bytes=100-", whole.content[100:]),
        ("bytes=-50", whole.content[-50:]),
        (f"bytes=10-{size + 5}", whole.content[10:]),
    ):
        answer = part(value)
        assert (answer.status_code, answer.content) == (206, expected)
        digest = base64.b64encode(hashlib.sha256(expected).digest()).decode()
        assert answer.headers["content-digest"] == f"sha-256=:{digest}:"
    assert part("bytes=0-99").headers["content-range"] == f"bytes 0-99/{size}"
    assert part(f"bytes={size}-").status_code == 416
    assert part("bytes=0-99", **{"If-Range": '"another"'}).status_code == 200
    assert part("bytes=0-99", **{"If-Range": etag}).status_code == 206
    for several in ("bytes=0-1,5-6", "lines=0-1", "bytes=9-3", "bytes=-"):
        assert part(several).content == whole.content
    head = client.head(f"{location}/image", headers={"Range": "bytes=0-99"})
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["etag"], int(head.headers["content-length"])) == (etag, size)


def test_realism_blends_the_instant_and_the_finished_picture(
    client: httpx.Client, stream: bytes
) -> None:
    location = submit(client, stream)
    wait_for(client, location)

    def at(alpha: float) -> image.Pixels:
        answer = client.get(f"{location}/image", params={"realism": alpha})
        assert answer.headers["x-afterimage-tier"] == ("instant" if alpha == 0 else "perceptual")
        return image.read(answer.content, 10**6)

    instant = image.read(client.post("/v1/decodes", content=stream).content, 10**6)
    finished = at(1)
    assert np.array_equal(at(0), instant)
    middle = at(0.5).astype(int)
    assert np.abs(middle - (instant.astype(int) + finished) / 2).max() <= 1
    assert not np.array_equal(middle, instant)
    refused = client.get(f"{location}/image", params={"realism": 1.5})
    assert refused.status_code == 422


def test_a_picture_of_a_minimum_tier_can_be_waited_for(client: httpx.Client, stream: bytes) -> None:
    location = submit(client, stream, tier="ddim-10", steps=60)
    pending = client.get(f"{location}/image", params={"min_tier": "ddim-10"})
    assert (pending.status_code, "retry-after" in pending.headers) == (202, True)
    done = client.get(
        f"{location}/image", params={"min_tier": "ddim-10"}, headers={"Prefer": "wait=60"}
    )
    assert (done.status_code, done.headers["x-afterimage-tier"]) == (200, "ddim-10")
    never = client.get(f"{location}/image", params={"min_tier": "ddpm-1000"})
    assert never.status_code == 409


def test_a_status_request_may_wait_for_the_end(client: httpx.Client, stream: bytes) -> None:
    location = submit(client, stream)
    shown = client.get(location, headers={"Prefer": "wait=60"})
    assert shown.json()["status"] == "succeeded"
    location = submit(client, stream, **SLOW)
    began = time.monotonic()
    shown = client.get(location, headers={"Prefer": "wait=1"})
    assert shown.json()["status"] in {"queued", "running"}
    assert 0.9 < time.monotonic() - began < 8
    assert shown.headers["preference-applied"] == "wait=1"
    client.delete(location)


def test_waiting_ends_when_the_client_disconnects(service: Service, stream: bytes) -> None:
    client = service.client
    location = submit(client, stream, tier="ddpm-1000")
    with service.stores() as store:

        def waiting() -> int:
            clients = store.queue.client_list()
            return sum(c["cmd"] == "xread" and "b" in c["flags"] for c in clients)

        def wait() -> None:
            with pytest.raises(httpx.ReadTimeout):
                client.get(location, headers={"Prefer": "wait=60"}, timeout=2)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ended = pool.submit(wait)
            until(waiting, "its decode is followed")
            ended.result()
        until(lambda: not waiting(), "its decode is no longer followed", 2)
    client.delete(location)


def test_events_are_complete_and_can_be_resumed(service: Service, stream: bytes) -> None:
    client = service.client
    location = submit(client, stream, tier="ddim-100", steps=200)
    with client.stream("GET", f"{location}/events", timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        received = []
        for event in events(answer.iter_lines()):
            received.append(event)
            if event["event"] == "preview":
                preview = client.get(event["data"]["image"])  # type: ignore[index]
                assert preview.headers["content-type"] == "image/webp"
                assert image.read(preview.content, 10**6).shape == (60, 64, 3)
    kinds = [event["event"] for event in received]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "completed"
    assert "preview" in kinds
    assert 90 < kinds.count("progress") <= 100
    steps = [e["data"]["step"] for e in received if e["event"] == "progress"]  # type: ignore[index]
    assert steps == sorted(steps)
    ids = [str(event["id"]) for event in received]
    with client.stream("GET", f"{location}/events", headers={"Last-Event-ID": ids[5]}) as answer:
        rest = list(events(answer.iter_lines()))
    assert [event["id"] for event in rest] == ids[6:]
    for unknown in ("?", f"{2**64}-0"):
        with client.stream(
            "GET", f"{location}/events", headers={"Last-Event-ID": unknown}
        ) as answer:
            assert len(list(events(answer.iter_lines()))) == len(received)
    with service.stores() as store:
        store.queue.delete(
            store.key("events", location.rpartition("/")[2])
        )  # events expire before the record
    began = time.monotonic()
    with client.stream("GET", f"{location}/events") as answer:
        (end,) = events(answer.iter_lines())
    assert end["event"] == "completed"
    assert time.monotonic() - began < 3


def test_a_queued_decode_is_canceled_at_once_and_can_be_retried(
    client: httpx.Client, stream: bytes
) -> None:
    first = submit(client, stream, **SLOW)
    reaches(client, first, "running")
    second = submit(client, stream, **SLOW, seed=1)
    withdrawn = client.delete(second)
    assert (withdrawn.status_code, withdrawn.json()["status"]) == (200, "canceled")
    assert client.delete(second).status_code == 409
    pending = client.get(f"{second}/image", params={"min_tier": "ddim-100"})
    assert pending.status_code == 409
    assert client.get(f"{second}/image").headers["x-afterimage-tier"] == "instant"

    stopping = client.delete(first)
    assert stopping.status_code == 202 or stopping.json()["status"] == "canceled"  # already
    assert reaches(client, first, "canceled") < 5

    again = client.post(f"{second}/retry")
    assert again.status_code == 202
    assert again.json()["status"] in {"queued", "running"}  # a worker may be quick
    assert client.post(f"{second}/retry").status_code == 409
    client.delete(second)


def test_many_clients_may_wait_at_one_process(client: httpx.Client, stream: bytes) -> None:
    """More than 100, redis-py's default limit of connections."""
    many = 130
    location = submit(client, stream, **SLOW)
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=client.base_url, timeout=60, limits=limits) as listener,
        concurrent.futures.ThreadPoolExecutor(many) as pool,
    ):
        prefer = {"Prefer": "wait=40"}
        waiting = [pool.submit(listener.get, location, headers=prefer) for _ in range(many)]
        time.sleep(2)
        done = [one for one in waiting if one.done()]
        assert not done, done[0].result().text
        client.delete(location)
        answers = [one.result() for one in waiting]
    assert {(a.status_code, a.json()["status"]) for a in answers} == {(200, "canceled")}


def test_an_expired_picture_is_gone_until_it_is_retried(service: Service, stream: bytes) -> None:
    client = service.client
    location = submit(client, stream)
    wait_for(client, location)
    before = client.get(f"{location}/image").content
    with service.stores() as store:
        store.cache.delete(store.key("picture", location.rpartition("/")[2]))
    for path in ("", "/image", "/events"):
        assert client.get(f"{location}{path}").status_code == 410
    assert client.post(f"{location}/retry").status_code == 202
    wait_for(client, location)
    assert client.get(f"{location}/image").content == before


def test_a_picture_whose_record_is_lost_is_drawn_again(service: Service, stream: bytes) -> None:
    client = service.client
    params: dict[str, str | int] = {"tier": "ddim-10", "seed": 31}
    location = submit(client, stream, **params)
    wait_for(client, location)
    with service.stores() as store:
        store.queue.delete(store.key("job", location.rpartition("/")[2]))
    again = client.post("/v1/decodes", params=params, content=stream)
    assert again.headers["x-cache"] == "miss"
    assert wait_for(client, location)["status"] == "succeeded"


def test_equal_settings_under_two_tier_names_are_one_decode(
    client: httpx.Client, stream: bytes
) -> None:
    location = submit(client, stream, tier="ddim-10", steps=100, seed=32)
    assert submit(client, stream, tier="ddim-100", seed=32) == location
    too_much = client.get(f"{location}/image", params={"min_tier": "ddpm-1000"})
    assert too_much.status_code == 409  # at once, before the picture is finished
    wait_for(client, location)
    found = client.get(f"{location}/image", params={"min_tier": "ddim-100"})
    assert (found.status_code, found.headers["x-afterimage-tier"]) == (200, "ddim-10")


def test_a_job_without_subscribers_is_canceled_before_it_begins(
    service: Service, stream: bytes
) -> None:
    client = service.client
    first = submit(client, stream, **SLOW)
    reaches(client, first, "running")
    second = submit(client, stream, **SLOW, seed=1, deadline_s=1)
    time.sleep(1.2)
    client.delete(first)
    with service.stores() as store:  # a request over HTTP would renew the subscription
        key, deadline = store.key("job", second.rpartition("/")[2]), time.monotonic() + 30
        while (status := store.queue.hget(key, "status")) == b"queued":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert status == b"canceled"


def test_a_running_job_stops_when_its_last_subscription_ends(
    service: Service, stream: bytes
) -> None:
    location = submit(service.client, stream, **{**SLOW, "steps": 1000}, deadline_s=600)
    id = location.rpartition("/")[2]
    with service.stores() as store:
        key, deadline = store.key("job", id), time.monotonic() + 60
        while int(store.queue.hget(key, "step") or 0) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        interest: list[Any] = store.queue.zrange(store.key("interest", id), 0, -1)
        (caller,) = interest
        store.queue.zadd(
            store.key("interest", id), {caller: time.time() + 1}
        )  # let the subscription end
        while (status := store.queue.hget(key, "status")) in {b"queued", b"running"}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status == b"canceled"
        assert 0 < int(store.queue.hget(key, "step") or 0) < 1000
    preview = service.client.get(f"{location}/preview")  # the best so far
    assert preview.headers["content-type"] == "image/webp"
    assert preview.headers["x-afterimage-note"] == "synthesised detail"
    with Image.open(io.BytesIO(preview.content)) as picture:
        description = picture.getexif()[ExifTags.Base.ImageDescription]
    assert "synthesised detail" in description


def test_a_long_queue_refuses_new_jobs_but_not_repeated_requests(
    service: Service, stream: bytes
) -> None:
    client = service.client
    with service.stores() as store:
        key = store.key("sums")
        wait_for(client, submit(client, stream, tier="ddim-10", seed=9))
        while not (before := store.queue.hgetall(key)):
            time.sleep(0.1)  # a job's duration is recorded after its end
        withdrawn = submit(client, stream, **SLOW, seed=7)
        client.delete(withdrawn)
        reaches(client, withdrawn, "canceled")
        first = submit(client, stream, **SLOW)
        million = estimates.RegressionSums.of(1e6, 1.0)  # seconds per megapixel-step
        slow = json.dumps((*million.values, 0))
        try:
            for seed in (1, 2, 3):  # an earlier job may overwrite it at its end
                store.queue.hset(key, mapping=dict.fromkeys(before, slow))
                new = client.post("/v1/decodes", params={**SLOW, "seed": seed}, content=stream)
                if new.status_code == 503:
                    break
                client.delete(new.headers["location"])
                time.sleep(1)
            assert (new.status_code, new.json()["type"]) == (503, "urn:afterimage:problem:busy")
            assert int(new.headers["retry-after"]) > 1000
            assert submit(client, stream, **SLOW) == first
            again = client.post(f"{withdrawn}/retry")
            assert (again.status_code, again.json()["type"]) == (503, new.json()["type"])
            assert client.post("/v1/decodes", content=stream).status_code == 200  # instant
        finally:
            client.delete(first)
            reaches(client, first, "canceled")
            store.queue.hset(key, mapping=dict[Any, Any](before))


def test_an_idempotency_key_belongs_to_one_request(client: httpx.Client, stream: bytes) -> None:
    def send(seed: int) -> httpx.Response:
        return client.post(
            "/v1/decodes",
            params={"tier": "ddim-10", "steps": 2, "seed": seed},
            content=stream,
            headers={"Idempotency-Key": "a key of mine"},
        )

    first, same, other = send(1), send(1), send(2)
    assert first.headers["location"] == same.headers["location"]
    assert (other.status_code, "key-reused" in other.json()["type"]) == (422, True)
    wait_for(client, first.headers["location"])


def test_a_decode_of_removed_weights_is_not_blended_with_other_weights(
    service: Service, small_compressai: bytes
) -> None:
    """A bitstream in CompressAI's format names no weights, so other weights would decode it now."""
    client = service.client
    location = submit(client, small_compressai)
    wait_for(client, location)
    with service.stores() as store:
        state = Jobs(store).get(location.rpartition("/")[2])
        assert state is not None
        past = replace(state.decode, codec="0" * 16)
        ended = {**JobState.queued(past).new_record(), "status": "succeeded"}
        store.queue.hset(store.key("job", past.id), mapping=ended)
        store.cache.set(store.key("picture", past.id), client.get(f"{location}/image").content)
    whole, mixed = (client.get(f"/v1/decodes/{past.id}/image?realism={a}") for a in (1, 0.5))
    assert whole.status_code == 200
    assert (mixed.status_code, "wrong-weights" in mixed.json()["type"]) == (422, True)


def test_other_callers_keep_a_job_alive(service: Service, stream: bytes) -> None:
    client = service.client
    location = submit(client, stream, **SLOW)
    with service.stores() as store:
        store.queue.zadd(
            store.key("interest", location.rpartition("/")[2]), {"another": time.time() + 60}
        )
        answer = client.delete(location)
        assert (answer.status_code, answer.json()["status"] != "canceled") == (200, True)
        store.queue.zrem(store.key("interest", location.rpartition("/")[2]), "another")
    wait_for(client, location)


def test_models_and_limits_are_listed(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()
    assert [m["quality"] for m in models if m["kind"] == "codec"] == [1, 2, 3]
    assert all(len(m["weights_id"]) == 16 for m in models)
    limits = client.get("/v1/limits").json()
    assert limits["pixels"] == 1_000_000
    assert limits["steps"] == 1000
    assert client.get("/startupz").status_code == 200


def test_many_duplicates_are_one_computation(service: Service, stream: bytes) -> None:
    client = service.client
    params: dict[str, str | int] = {"tier": "ddim-10", "seed": 3}
    with service.stores() as store:
        before = counters.read(store).get(counters.SUCCEEDED)
    etags: list[str] = []

    def one() -> None:
        with httpx.Client(base_url=client.base_url, timeout=120) as own:
            location = submit(own, stream, **params)
            wait_for(own, location)
            etags.append(own.get(f"{location}/image").headers["etag"])

    threads = [threading.Thread(target=one) for _ in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(etags) == 24
    assert len(set(etags)) == 1
    assert client.get(submit(client, stream, **params)).json()["attempts"] == 1
    with service.stores() as store:
        assert counters.read(store).get(counters.SUCCEEDED) == before + 1
