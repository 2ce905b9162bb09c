"""A service with API keys: scopes, quotas, and signed links for clients without a key."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import FilePayload, Page, expect

from service.client import ApiError, Client
from tests.support.api_keys import TOKENS
from tests.support.service import Service
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def test_without_a_key_only_public_routes_answer(guarded: Service, small_msh: bytes) -> None:
    client = guarded.client
    for path in ("/livez", "/readyz", "/v1/tiers", "/v1/limits"):
        assert client.get(path).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "wrong"}):
        answer = client.post("/v1/decodes", content=small_msh, headers=headers)
        assert (answer.status_code, answer.json()["status"]) == (401, 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        garbage = client.post("/v1/decodes", content=b"?", headers=headers)
        assert garbage.status_code == 401  # before the body is parsed
    answer = client.post("/v1/decodes", content=small_msh, headers={"X-API-Key": TOKENS["both"]})
    assert answer.status_code == 200
    assert answer.headers["cache-control"].startswith("private, ")


def test_pages_of_named_origins_may_call_the_api(guarded: Service) -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key, prefer",
    }

    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, **preflight}
        answer = guarded.client.options("/v1/decodes", headers=headers)
        origins: str | None = answer.headers.get("access-control-allow-origin")
        return origins

    origin = "https://gallery.example"
    assert allowed(origin) == origin
    assert allowed("https://other.example") is None
    answer = guarded.client.get("/v1/tiers", headers={"Origin": origin})
    assert answer.headers["access-control-expose-headers"] == "*"
    assert answer.headers["x-request-id"]


def test_the_page_asks_for_a_key(guarded: Service, small_msh: bytes, page: Page) -> None:
    page.goto(str(guarded.client.base_url))
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    coded: FilePayload = {"name": "small.msh", "mimeType": "", "buffer": small_msh}
    page.set_input_files("#chosen", files=[coded])
    for key, said in (("", "no API key and no valid"), ("wrong", "the API key is not valid")):
        if key:
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text(said)
    page.get_by_label("API key").fill(TOKENS["both"])
    page.keyboard.press("Enter")
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=60_000)
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_hidden()


def test_a_key_is_limited_to_its_scopes(guarded: Service, small_msh: bytes) -> None:
    client = guarded.client
    assert client.post("/v1/inspect", content=small_msh, headers=by("decoder")).status_code == 200
    refused = client.post("/v1/encodes", content=b"", headers=by("decoder"))
    assert refused.status_code == 403
    assert client.post("/v1/encodes", content=b"", headers=by("both")).status_code == 422


def test_a_rate_limit_says_when_to_retry(guarded: Service, small_msh: bytes) -> None:
    answers = [
        guarded.client.post("/v1/inspect", content=small_msh, headers=by("hasty")) for _ in range(4)
    ]
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    assert "r=0" in answers[-1].headers["ratelimit"]
    assert "r=2" in answers[0].headers["ratelimit"]


def test_jobs_at_once_are_limited(guarded: Service, small_msh: bytes) -> None:
    def post(seed: int) -> httpx.Response:
        params: dict[str, str | int] = {"tier": "ddim-100", "steps": 300, "seed": seed}
        return guarded.client.post(
            "/v1/decodes", params=params, content=small_msh, headers=by("single")
        )

    first, same, second = post(1), post(1), post(2)
    assert [a.status_code for a in (first, same, second)] == [200, 200, 429]
    assert second.headers["ratelimit"].startswith('"jobs";r=0;')
    location = first.headers["location"]
    assert guarded.client.delete(location, headers=by("single")).status_code in {200, 202}
    deadline = time.monotonic() + 30
    while (again := post(2)).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    guarded.client.delete(again.headers["location"], headers=by("single"))


def test_a_link_shows_one_picture_to_everyone_who_has_it(
    guarded: Service, small_msh: bytes
) -> None:
    client = guarded.client
    with httpx.Client(base_url=client.base_url, headers=by("both"), timeout=60) as own:
        location = own.post(
            "/v1/decodes", params={"tier": "perceptual"}, content=small_msh
        ).headers["location"]
        wait_for(own, location)
        made, short = (
            own.post(f"{location}/links", params={"seconds": seconds, "realism": 0.5})
            for seconds in (60, 1)
        )
        kept = own.get(f"{location}/image").headers["cache-control"]
    assert kept.startswith("private, ")  # shared caches must not store it
    assert made.status_code == 201
    url = made.json()["url"]
    shown = client.get(url)
    assert (shown.status_code, shown.headers["x-afterimage-realism"]) == (200, "0.5")
    age = re.fullmatch(r"private, max-age=(\d+)", shown.headers["cache-control"])
    assert age and 30 <= int(age[1]) <= 60
    assert client.head(url).status_code == 200
    assert client.get(url.replace("realism=0.5", "realism=1.0")).status_code == 401
    assert client.get(f"{location}/image").status_code == 401
    odd = client.get(f"{location}/image", params={"expires": "²"}, headers=by("both"))
    assert odd.status_code == 200
    assert client.delete(url).status_code in {401, 405}
    time.sleep(1.1)
    assert client.get(short.json()["url"]).status_code == 401


def test_the_client_and_the_command_line_send_their_key(
    guarded: Service, small_msh: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.cli.main import main

    url = str(guarded.client.base_url)
    with Client(url) as client, pytest.raises(ApiError) as refused:
        list(client.decode(small_msh, "instant"))
    assert refused.value.status == 401
    with Client(url, TOKENS["both"]) as client:
        assert [u.kind for u in client.decode(small_msh, "instant")] == ["final"]
    (tmp_path / "a.msh").write_bytes(small_msh)
    command = ["decode", str(tmp_path / "a.msh"), "-o", str(tmp_path / "a.png"), "--url", url]
    with ThreadPoolExecutor(1) as pool:  # the browser's event loop runs in this thread
        assert pool.submit(main, command).result() == 1
        monkeypatch.setenv("AFTERIMAGE_API_KEY", TOKENS["both"])
        assert pool.submit(main, command).result() == 0


def test_without_a_secret_webhooks_are_refused(guarded: Service, small_msh: bytes) -> None:
    params: dict[str, str | int] = {
        "tier": "perceptual",
        "webhook": "https://example.org/",
        "seed": 77,
    }
    answer = guarded.client.post(
        "/v1/decodes", params=params, content=small_msh, headers=by("both")
    )
    assert answer.status_code == 422
    assert "AFTERIMAGE_WEBHOOK_SECRET" in answer.json()["detail"]
