"""Requests of different clients: `Accept`, forms, query parameters, signed links, large seeds."""

import base64
import concurrent.futures
import gzip
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx
import numpy as np
import pytest

from models import image
from service.keys import digest
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app
from worker.attempt import Attempt
from worker.queue import outbox
from worker.queue.jobs import POLL_SUBSCRIPTION_S, Jobs
from worker.queue.records import JobState
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]

FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
TOKEN = "ai_" + secrets.token_urlsafe(32)
ASYNC = {"Prefer": "respond-async"}
JSON = {"Accept": "application/json"}
LARGE_SEED = 2**53 + 1
"""JavaScript reads it as 2^53."""


@pytest.fixture(scope="module")
def guarded(
    redis_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A service with an API key, TOKEN, and signed links."""
    queue, cache = redis_urls
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        f'[[keys]]\nname = "tests"\nsha256 = "{digest(TOKEN)}"\nscopes = ["decode", "encode"]\n'
    )
    settings = ServiceSettings(
        REDIS_URL=queue, CACHE_REDIS_URL=cache, api_keys=file, link_secret=secrets.token_hex(32)
    )
    with weights.loaded_once(), run_app(settings) as client:
        yield client


def queue_decode(
    api: httpx.Client, data: bytes, seed: int = 0, headers: dict[str, str] | None = None
) -> httpx.Response:
    params: dict[str, str | int] = {"tier": "perceptual", "seed": seed}
    return api.post("/v1/decodes", params=params, content=data, headers=ASYNC | (headers or {}))


def finish(store: Store, location: str, picture: image.Pixels) -> None:
    """Do what a worker does: take the job and store its picture."""
    attempt = Attempt.begin(Jobs(store), location.split("/")[-1])
    assert attempt is not None
    attempt.commit(image.write(picture, "png"))


@pytest.fixture
def finished(api: httpx.Client, store: Store, small_msh: bytes, small: image.Pixels) -> str:
    """The location of a finished decode with seed 0."""
    location = queue_decode(api, small_msh).headers["location"]
    finish(store, location, small)
    return str(location)


def faults(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 422, answer.text
    assert answer.json()["type"].endswith(":parameter-error")
    listed: list[dict[str, Any]] = answer.json()["errors"]
    return listed


# `Accept` concerns pictures: status documents and problems are JSON.


@pytest.mark.usefixtures("store")
def test_a_client_that_accepts_only_json_can_queue_a_decode(
    api: httpx.Client, small_msh: bytes
) -> None:
    answer = queue_decode(api, small_msh, headers=JSON)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    pending = api.get(
        f"{answer.headers['location']}/image", params={"min_tier": "perceptual"}, headers=JSON
    )
    assert (pending.status_code, pending.json()["status"]) == (202, "queued")


@pytest.mark.parametrize("prefer", ["", "respond-async", "respond-async, wait=1"])
def test_a_submission_subscribes_its_caller_until_the_deadline_and_polling_extends_it(
    api: httpx.Client, store: Store, small_msh: bytes, prefer: str
) -> None:
    jobs = Jobs(store)
    query: dict[str, str | int] = {"tier": "perceptual", "deadline_s": 60}
    headers = {"Prefer": prefer} if prefer else {}
    location = api.post("/v1/decodes", params=query, content=small_msh, headers=headers).headers[
        "location"
    ]

    def remaining_s() -> float:
        key = jobs.subscribers(location.rpartition("/")[2])
        subscriptions: Any = store.queue.zrange(key, 0, -1, withscores=True)
        ((_, end),) = subscriptions
        return float(end) - jobs.now()

    assert 50 < remaining_s() <= 60
    assert api.get(location).json()["status"] == "queued"
    assert 590 < remaining_s() <= POLL_SUBSCRIPTION_S


def test_a_json_client_gets_the_status_instead_of_a_finished_picture(
    api: httpx.Client, finished: str, small_msh: bytes
) -> None:
    answer = queue_decode(api, small_msh, headers=JSON)
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["location"] == finished
    assert answer.headers["content-type"] == "application/json"
    picture = api.get(f"{finished}/image", headers=JSON)
    assert (picture.status_code, picture.json()["type"]) == (
        406,
        "urn:afterimage:problem:not-acceptable",
    )


def test_without_respond_async_an_unacceptable_picture_is_refused_before_it_is_queued(
    api: httpx.Client, store: Store, small_msh: bytes
) -> None:
    for tier in ("instant", "perceptual"):
        answer = api.post(f"/v1/decodes?tier={tier}", content=small_msh, headers=JSON)
        assert answer.status_code == 406
    assert not Jobs(store).line.job_ids()


def test_an_error_is_reported_whatever_the_client_accepts(api: httpx.Client) -> None:
    unknown = api.get(f"/v1/decodes/{'0' * 32}/image", headers=JSON)
    assert unknown.status_code == 404
    assert api.post("/v1/decodes", content=b"", headers=JSON).status_code == 400


def test_a_format_that_cannot_hold_the_picture_is_not_chosen(
    api: httpx.Client, store: Store
) -> None:
    wide = np.zeros((16, 16384, 3), np.uint8)
    data = api.post("/v1/encodes", content=image.write(wide, "png")).content
    either = {"Accept": "image/webp, image/png;q=0.5"}
    answer = api.post("/v1/decodes", content=data, headers=either)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    refused = api.post("/v1/decodes", content=data, headers={"Accept": "image/webp"})
    assert refused.status_code == 406
    assert "for 16384×16 pixels are image/png, image/avif" in refused.json()["detail"]


# Forms hold one file.


def form(*parts: str, content_type: str = "multipart/form-data; boundary=xx") -> dict[str, Any]:
    """A request of these parts, each a header's parameters, a newline, and a body."""
    body = b""
    for part in parts:
        parameters, _, content = part.partition("\n")
        head = f"--xx\r\nContent-Disposition: form-data; {parameters}\r\n\r\n"
        body += head.encode() + content.encode("latin-1") + b"\r\n"
    return {"content": body + b"--xx--\r\n", "headers": {"Content-Type": content_type}}


@pytest.mark.parametrize(
    "charset", ["UTF-8", "utf8", "US-ASCII", "ISO-8859-1", "windows-1252", "punycode", "nonsense"]
)
def test_the_charset_of_a_form_is_ignored(
    api: httpx.Client, small_msh: bytes, charset: str
) -> None:
    part = 'name="file"; filename="p.msh"\n' + small_msh.decode("latin-1")
    content_type = f'multipart/form-data; boundary="xx"; charset={charset}'
    answer = api.post("/v1/inspect", **form(part, content_type=content_type))
    assert (answer.status_code, answer.json()["bytes"]) == (200, len(small_msh))


@pytest.mark.parametrize("extra", [";a=b" * 65, "; a=" + "b" * 8192])
def test_a_content_type_with_too_many_parameters_is_refused(api: httpx.Client, extra: str) -> None:
    content_type = "multipart/form-data; boundary=xx" + extra
    answer = api.post("/v1/inspect", **form(content_type=content_type))
    assert answer.status_code == 400
    assert "at most 8192 characters and 64 parameters" in answer.json()["detail"]


@pytest.mark.parametrize(
    "parameters",
    [
        "filename*=UTF-8''%D1%84.msh",
        "filename=\"p.msh\"; filename*=UTF-8''%D1%84.msh",
        "x=y\rContent-Type: application/octet-stream",
        "x=y\rContent-Type: image/png",
    ],
)
def test_a_part_without_a_plain_file_name_is_still_a_file(
    api: httpx.Client, small_msh: bytes, parameters: str
) -> None:
    """urllib3 before 1.25 sends other names than ASCII so; scripts often send no name."""
    part = f'name="file"; {parameters}\n' + small_msh.decode("latin-1")
    request = form(part)
    request["content"] = request["content"].replace(b"\rContent-Type", b"\r\nContent-Type", 1)
    answer = api.post("/v1/inspect", **request)
    assert (answer.status_code, answer.json()["bytes"]) == (200, len(small_msh))


@pytest.mark.parametrize("before", [b"\r\n", b"This is a form.\r\n", b"A: b\r\n\r\n--x\r\n"])
def test_text_before_the_first_boundary_of_a_form_is_ignored(
    api: httpx.Client, small_msh: bytes, before: bytes
) -> None:
    request = form('name="file"; filename="p.msh"\n' + small_msh.decode("latin-1"))
    request["content"] = before + request["content"] + b"text after it"
    answer = api.post("/v1/inspect", **request)
    assert (answer.status_code, answer.json()["bytes"]) == (200, len(small_msh))


@pytest.mark.parametrize(
    ("content_type", "removed", "message"),
    [
        ("multipart/form-data", b"", "names no boundary; do not set Content-Type yourself"),
        ("multipart/form-data; boundary=yy", b"", "'--yy' is not in the body"),
        ("multipart/form-data; boundary=xx", b"--xx--", "truncated: its last boundary, '--xx--'"),
    ],
)
def test_the_error_about_a_broken_form_says_what_is_missing(
    api: httpx.Client, small_msh: bytes, content_type: str, removed: bytes, message: str
) -> None:
    part = 'name="file"; filename="p.msh"\n' + small_msh.decode("latin-1")
    request = form(part, content_type=content_type)
    request["content"] = request["content"].removesuffix(removed + b"\r\n")
    answer = api.post("/v1/inspect", **request)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_fields_of_a_form_are_refused_and_named(api: httpx.Client, small: image.Pixels) -> None:
    picture = image.write(small, "png")
    fields = {"quality": "3", "qualty": "3", "csrf": "x"}
    answer = api.post("/v1/encodes", data=fields, files={"file": ("a.png", picture)})
    listed = {fault["parameter"]: fault for fault in faults(answer)}
    assert listed.keys() == fields.keys()
    assert {fault["in"] for fault in listed.values()} == {"form"}
    assert "?quality=3" in listed["quality"]["message"]
    assert "did you mean quality?" in listed["qualty"]["message"]
    assert "this route reads quality, metric, format" in listed["csrf"]["message"]


def test_a_second_file_is_refused(api: httpx.Client, small_msh: bytes) -> None:
    files = [("one", ("a.msh", small_msh)), ("two", ("b.msh", small_msh))]
    (fault,) = faults(api.post("/v1/inspect", files=files))
    assert fault["parameter"] == "two"
    assert "2 files" in fault["message"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("blank", ['name="a"; filename=""\n', 'name="a"; filename="empty.msh"\n'])
def test_an_input_for_files_that_was_left_blank_is_skipped(
    api: httpx.Client, small_msh: bytes, blank: str, first: bool
) -> None:
    part = 'name="file"; filename="p.msh"\n' + small_msh.decode("latin-1")
    parts = (blank, part) if first else (part, blank)
    assert api.post("/v1/inspect", **form(*parts)).status_code == 200
    empty = api.post("/v1/inspect", **form(blank))
    assert (empty.status_code, "empty" in empty.json()["detail"]) == (400, True)


@pytest.mark.parametrize(
    "hostile",
    [
        FILE_PART * 30_000,
        (FILE_PART + b"x\r\n") * 17,
        b'--b\r\nContent-Disposition: form-data; name="' + b"x" * 2**21,
        b"--b\r\n" + b"A: b\r\n" * 300_000,
        FILE_PART + b"\r\n--" * 500_000,
        FILE_PART + b"\r\n--c" * 500_000,
        b"\r\n" * 2**20,
    ],
    ids=["parts", "files", "long name", "headers", "boundaries", "other boundaries", "preamble"],
)
def test_hostile_forms_are_malformed_and_let_others_through(
    api: httpx.Client, hostile: bytes
) -> None:
    def post() -> httpx.Response:
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        return api.post("/v1/inspect", content=hostile, headers=form)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        posted, longest = pool.submit(post), 0.0
        while not posted.done():
            began = time.monotonic()
            assert api.get("/livez").status_code == 200
            longest = max(longest, time.monotonic() - began)
    assert posted.result().status_code == 400
    assert longest < 0.5


def test_a_form_without_a_file_is_malformed(api: httpx.Client) -> None:
    answer = api.post("/v1/inspect", **form('name="file"\np.msh'))
    assert (answer.status_code, "no file" in answer.json()["detail"]) == (400, True)


# Unknown and misplaced query parameters are refused.


@pytest.mark.parametrize(
    ("method", "path", "name", "message"),
    [
        ("POST", "/v1/encodes", "qualty", "did you mean quality?"),
        ("POST", "/v1/decodes", "Tier", "did you mean tier?"),
        ("POST", "/v1/decodes", "TIER", "did you mean tier?"),
        ("POST", "/v1/decodes", "utm_medium", "this route reads source, tier, seed"),
        ("PUT", f"/v1/decodes/{'0' * 32}", "sead", "did you mean seed?"),
        ("POST", "/v1/inspect", "tier", "this route reads none"),
        ("GET", f"/v1/decodes/{'0' * 32}", "id", "this route reads none"),
        ("DELETE", f"/v1/decodes/{'0' * 32}", "force", "this route reads none"),
        ("GET", f"/v1/decodes/{'0' * 32}/events", "after", "this route reads lastEventId"),
        ("POST", f"/v1/decodes/{'0' * 32}/retry", "seed", "this route reads none"),
        ("POST", f"/v1/decodes/{'0' * 32}/links", "second", "did you mean seconds?"),
        ("GET", f"/v1/decodes/{'0' * 32}/image", "amp;realism", "did you mean realism?"),
        ("GET", "/v1/tiers", "verbose", "this route reads none"),
    ],
)
def test_an_unknown_query_parameter_is_refused_with_the_nearest_name(
    api: httpx.Client, method: str, path: str, name: str, message: str
) -> None:
    (fault,) = faults(api.request(method, path, params={name: "1"}))
    assert (fault["parameter"], fault["in"]) == (name, "query")
    assert message in fault["message"]


def test_a_repeated_query_parameter_is_refused_unless_it_is_a_list(
    api: httpx.Client, small_msh: bytes
) -> None:
    (fault,) = faults(api.post("/v1/decodes?seed=1&seed=2", content=small_msh))
    assert (fault["parameter"], "2 times" in fault["message"]) == ("seed", True)
    webhooks = "webhook=https://a.example/?x=1&webhook=https://b.example/"
    answer = api.post(f"/v1/decodes?tier=perceptual&{webhooks}", content=small_msh)
    assert "times" not in answer.text


def test_sampler_settings_of_an_instant_picture_are_refused(
    api: httpx.Client, small_msh: bytes
) -> None:
    answer = api.post("/v1/decodes?steps=5&eta=0.5", content=small_msh)
    assert answer.status_code == 422
    assert "steps, eta" in answer.json()["detail"]
    assert api.post("/v1/decodes?seed=5", content=small_msh).status_code == 200


def test_many_unknown_parameters_are_refused_without_comparing_them_all(api: httpx.Client) -> None:
    query = "&".join(f"x{i}=1" for i in range(60))
    assert len(faults(api.post(f"/v1/decodes?{query}"))) == 8


@pytest.mark.parametrize("parameter", ["x{i}=1", "utm_{i}=1", "seed=0", "webhook=", ""])
@pytest.mark.parametrize("path", ["/v1/decodes", f"/v1/decodes/{32 * 'a'}/image", "/v1/tiers"])
def test_thousands_of_parameters_are_refused_before_they_are_parsed(
    api: httpx.Client, path: str, parameter: str
) -> None:
    query = "&".join(parameter.format(i=i) for i in range(5_000))
    ((fault),) = faults(
        api.request("POST" if path.endswith("decodes") else "GET", f"{path}?{query}")
    )
    assert "more than 64 parameters" in fault["message"]


# Links are opened by browsers, and pass through messengers and newsletters.

TRACKING = (
    "&utm_source=mail&utm_campaign=x&fbclid=abc&gclid=1&mc_eid=2&_hsenc=3&twclid=4"
    "&ref=a&UTM_Medium=b&si=c&__s=d&fb_source=e"
)


def test_analytics_parameters_on_a_picture_are_ignored(api: httpx.Client, finished: str) -> None:
    assert api.get(f"{finished}/image?realism=1{TRACKING}").status_code == 200
    preview = api.get(f"{finished}/preview?step=2{TRACKING}")
    assert preview.status_code == 404  # there is no preview, but nothing is wrong with the query


@pytest.fixture
def link(guarded: httpx.Client, store: Store, small_msh: bytes, small: image.Pixels) -> str:
    """The address of a signed link to a finished picture at realism 1."""
    key = {"X-API-Key": TOKEN}
    location = queue_decode(guarded, small_msh, headers=key).headers["location"]
    finish(store, location, small)
    return str(guarded.post(f"{location}/links", headers=key).json()["url"])


def test_a_signed_link_keeps_working_with_analytics_parameters(
    guarded: httpx.Client, link: str
) -> None:
    path, _, query = link.partition("?")
    reordered = urlencode(parse_qsl(query)[::-1])
    for url in (link, link + TRACKING, f"{path}?{TRACKING[1:]}&{reordered}"):
        assert guarded.get(url).status_code == 200
        assert guarded.head(url).status_code == 200


def test_a_signed_link_that_was_copied_from_html_works(guarded: httpx.Client, link: str) -> None:
    assert "&" in link
    assert guarded.get(link.replace("&", "&amp;")).status_code == 200


def test_a_signed_link_may_spell_a_number_differently(guarded: httpx.Client, link: str) -> None:
    assert "realism=1.0&" in link
    assert guarded.get(link.replace("realism=1.0&", "realism=1&")).status_code == 200


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("realism=1.0", "realism=0.5"),
        ("realism=1.0", "realism=nan"),
        ("realism=1.0&", ""),
        ("min_tier=instant", "min_tier=perceptual"),
        ("signature=", "signature=x"),
        ("expires=", "expires=9"),
    ],
)
def test_a_changed_link_is_refused_with_the_reason(
    guarded: httpx.Client, link: str, old: str, new: str
) -> None:
    answer = guarded.get(link.replace(old, new))
    assert answer.status_code == 401
    assert "altered or has expired" in answer.json()["detail"]


def test_a_link_with_added_parameters_is_refused(guarded: httpx.Client, link: str) -> None:
    assert guarded.get(f"{link}&realism=1.0").status_code == 422
    assert guarded.get(f"{link}&more=1").status_code == 422
    assert guarded.get(link.partition("?")[0]).status_code == 401


# Seeds are 64-bit; JavaScript's numbers have 53 bits.


@pytest.mark.parametrize("seed", [0, LARGE_SEED, 2**64 - 1])
def test_the_status_and_the_webhook_have_the_seed_as_text(
    api: httpx.Client, store: Store, small_msh: bytes, seed: int
) -> None:
    queued = queue_decode(api, small_msh, seed)
    status = api.get(queued.headers["location"])
    for document in (queued.json(), status.json()):
        assert (document["seed"], document["seed_text"]) == (seed, str(seed))
    state = Jobs(store).record(queued.json()["id"])
    assert isinstance(state, JobState)
    _, data = outbox.event(state)
    assert json.loads(json.dumps(data), parse_int=float)["seed_text"] == str(seed)


# Bodies are files, not compressed and not as text.


@pytest.mark.parametrize("encoding", ["gzip", "identity, br", "zstd"])
@pytest.mark.parametrize("path", ["/v1/decodes", "/v1/inspect", "/v1/encodes"])
def test_a_compressed_body_is_refused_by_its_header(
    api: httpx.Client, small_msh: bytes, path: str, encoding: str
) -> None:
    body = gzip.compress(small_msh)
    answer = api.post(path, content=body, headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert answer.json()["type"] == "urn:afterimage:problem:unsupported-encoding"
    assert (
        f"Content-Encoding is {encoding!r}; send the file uncompressed" in answer.json()["detail"]
    )


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_may_be_declared_as_not_compressed(
    api: httpx.Client, small_msh: bytes, encoding: str
) -> None:
    headers = {"Content-Encoding": encoding}
    assert api.post("/v1/inspect", content=small_msh, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/inspect", "/v1/encodes"])
def test_text_in_place_of_a_file_is_recognised(
    api: httpx.Client, small_msh: bytes, path: str
) -> None:
    encoded = base64.b64encode(small_msh)
    for body, message in (
        (encoded, "it is base64 text; send the decoded bytes"),
        (base64.encodebytes(small_msh), "it is base64 text; send the decoded bytes"),
        (b"data:image/png;base64," + encoded, "it is a data URL; send the decoded bytes"),
        (b'{"image": "' + encoded + b'"}', "it is JSON; send the bytes of the file"),
    ):
        answer = api.post(path, content=body)
        assert answer.status_code == 415
        assert message in answer.json()["detail"]
