"""API keys and signed links, in a small application."""

import logging
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI

from service import auth, problems, signed_urls
from service.auth import Caller, Keys
from service.deps import require
from service.keys import KeysError, digest
from service.requests import RequestMiddleware

TOKEN = "ai_" + "k" * 43
SECRET = b"0123456789abcdef0123456789abcdef"


def table(token: str = TOKEN, name: str = "gallery", scopes: str = '["decode"]', *more: str) -> str:
    return "\n".join(
        ("[[keys]]", f'name = "{name}"', f'sha256 = "{digest(token)}"', f"scopes = {scopes}", *more)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(table())
    return path


@pytest.fixture
def checked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is checked for changes at every request."""
    monkeypatch.setattr(auth, "CHECK_S", 0.0)


def application(keys: Keys | None, secret: bytes | None = None) -> FastAPI:
    app = FastAPI()
    problems.install(app)
    app.state.services = SimpleNamespace(keys=keys, link_secret=secret)

    @app.get("/decodes")
    @app.post("/decodes")
    async def decodes(caller: Annotated[Caller, Depends(require("decode"))]) -> str:
        return caller.name

    @app.get("/encodes")
    async def encodes(caller: Annotated[Caller, Depends(require("encode"))]) -> str:
        return caller.name

    @app.api_route("/image", methods=["GET", "HEAD", "POST"], include_in_schema=False)
    async def image(caller: Annotated[Caller, Depends(require("decode", or_link=True))]) -> str:
        return f"{caller.name} {sorted(caller.scopes)}"

    return app


def send_request(
    app: FastAPI, url: str = "/decodes", method: str = "GET", **headers: str
) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            dashed = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, url, headers=dashed)

    return anyio.run(send)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": f"bearer {TOKEN}"},
        {"X_API_Key": TOKEN},
        {"Authorization": "Basic Zm9vOmJhcg==", "X_API_Key": TOKEN},
    ],
)
def test_a_valid_key_authenticates_its_caller(file: Path, headers: dict[str, str]) -> None:
    response = send_request(application(Keys.read(file)), **headers)
    assert (response.status_code, response.json()) == (200, "gallery")


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, "Bearer"),
        ({"Authorization": "Basic Zm9vOmJhcg=="}, "Bearer"),
        ({"Authorization": "Bearer"}, "Bearer"),
        ({"X_API_Key": ""}, "Bearer"),
        ({"Authorization": f"Bearer {TOKEN}x"}, 'Bearer error="invalid_token"'),
        ({"X_API_Key": TOKEN[:-1]}, 'Bearer error="invalid_token"'),
        ({"X_API_Key": digest(TOKEN)}, 'Bearer error="invalid_token"'),
        ({"X_API_Key": TOKEN.upper()}, 'Bearer error="invalid_token"'),
        ({"Authorization": "Bearer x", "X_API_Key": TOKEN}, 'Bearer error="invalid_token"'),
    ],
)
def test_a_missing_or_wrong_key_is_unauthorized(
    file: Path, headers: dict[str, str], challenge: str
) -> None:
    response = send_request(application(Keys.read(file)), **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == challenge
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == "urn:afterimage:problem:unauthorized"
    assert TOKEN not in response.text


def test_a_key_with_non_ascii_characters_is_unknown(file: Path) -> None:
    assert Keys.read(file).find("schlüssel\x00") is None


def test_a_key_without_the_scope_is_forbidden(file: Path) -> None:
    response = send_request(application(Keys.read(file)), "/encodes", X_API_Key=TOKEN)
    assert response.status_code == 403
    assert response.json()["detail"] == (
        "the API key lacks the scope encode; use a key that has it"
    )
    assert 'scope="encode"' in response.headers["www-authenticate"]


def test_without_keys_every_client_has_all_scopes_and_is_named_by_its_address() -> None:
    app = application(None)
    for url in ("/decodes", "/encodes"):
        assert send_request(app, url).json() == "192.0.2.7"
    assert send_request(app, X_API_Key="any").json() == "192.0.2.7"


def test_a_key_is_valid_through_its_last_day(file: Path) -> None:
    today = datetime.now(UTC).date()
    for days, name in ((0, "gallery"), (30, "gallery"), (-1, None)):
        expires = f"expires = {today + timedelta(days)}"
        file.write_text(table(TOKEN, "gallery", '["decode"]', expires))
        caller = Keys.read(file).find(TOKEN)
        assert (caller.name if caller else None) == name


def test_each_key_sets_scopes_and_limits(file: Path) -> None:
    limits = ("requests_per_minute = 60", "jobs_at_once = 4")
    other = table("ai_other", "press", '["encode", "decode"]', *limits)
    file.write_text(f"{table()}\n{other}\n")
    keys = Keys.read(file)
    assert keys.find(TOKEN) == Caller("gallery", frozenset({"decode"}))
    assert keys.find("ai_other") == Caller("press", frozenset({"encode", "decode"}), 60, 4)


@pytest.mark.usefixtures("checked_each_time")
def test_a_changed_file_is_reloaded(file: Path) -> None:
    app = application(Keys.read(file))
    file.write_text(table("ai_new", "press"))
    assert send_request(app, X_API_Key=TOKEN).status_code == 401
    assert send_request(app, X_API_Key="ai_new").json() == "press"
    file.write_text("")
    assert send_request(app, X_API_Key="ai_new").status_code == 401


def test_a_removed_key_is_refused_within_two_seconds(file: Path) -> None:
    keys = Keys.read(file)
    file.write_text("")
    deadline = time.monotonic() + 2
    while keys.find(TOKEN) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert keys.find(TOKEN) is None


@pytest.mark.usefixtures("checked_each_time")
@pytest.mark.parametrize("damage", [lambda f: f.write_text("[[keys]"), os.remove])
def test_a_file_that_becomes_invalid_keeps_the_previous_keys_and_is_logged_once(
    file: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys.read(file)
    damage(file)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert keys.find(TOKEN) is not None
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    file.write_text(table("ai_new"))
    assert keys.find(TOKEN) is None
    assert keys.find("ai_new") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[keys]]\nname = \n", "at line 2"),
        ("keys = 3", "keys: Input should be a valid list"),
        ("[[key]]", "key: Extra inputs are not permitted"),
        ("[[keys]]", "keys.0.name: Field required"),
        (table(name="a b"), "keys.0.name: String should match"),
        (
            table(scopes='["decode", "all"]'),
            "keys.0.scopes.1: Input should be 'decode', 'encode' or 'operate'",
        ),
        (table(scopes="[]"), "keys.0.scopes: List should have at least 1 item"),
        (table(TOKEN, "a", '["decode"]', "jobs_at_once = 0"), "keys.0.jobs_at_once: Input should"),
        (table(TOKEN, "a", '["decode"]', 'priority = "low"'), "'interactive' or 'batch'"),
        (table(TOKEN, "a", '["decode"]', "weight = 0"), "keys.0.weight: Input should be greater"),
        (table(TOKEN, "a", '["decode"]', "weight = inf"), "keys.0.weight: Input should be"),
        (table(TOKEN, "a", '["decode"]', 'expires = "soon"'), "keys.0.expires: Input should be"),
        (table(TOKEN, "a", '["decode"]', "requests = 1"), "keys.0.requests: Extra inputs"),
        (f'{table()}\n[[keys]]\nname = "cut', "not valid TOML"),
        (f"{table()}\n{table(name='press')}", "two keys have the same sha256"),
        (table().replace(digest(TOKEN), TOKEN), "keys.0.sha256: String should match"),
    ],
)
def test_the_error_of_an_invalid_file_names_line_or_field(
    file: Path, text: str, message: str
) -> None:
    file.write_text(text)
    with pytest.raises(KeysError) as caught:
        Keys.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_the_error_of_an_unreadable_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="missing.toml: No such file or directory"):
        Keys.read(tmp_path / "missing.toml")
    (tmp_path / "keys.toml").write_bytes(b"\xff")
    with pytest.raises(KeysError, match="keys.toml: the file is not UTF-8"):
        Keys.read(tmp_path / "keys.toml")


def test_a_link_allows_only_its_own_picture(file: Path) -> None:
    app = application(Keys.read(file), SECRET)
    later = int(time.time()) + 60
    url = signed_urls.sign(SECRET, "/image", "realism=0.5", later)
    assert send_request(app, url).json() == "link:192.0.2.7 []"
    assert send_request(app, url, "HEAD").status_code == 200
    assert send_request(app, url, "POST").status_code == 401
    refused = (
        url.replace("0.5", "0.6"),
        url.replace("/image", "/decodes"),
        signed_urls.sign(SECRET, "/decodes", "", later),  # this route accepts no links
        signed_urls.sign(SECRET, "/image", "", later - 61),
        signed_urls.sign(secrets.token_bytes(), "/image", "", later),
    )
    assert [send_request(app, other).status_code for other in refused] == [401] * len(refused)
    assert send_request(application(Keys.read(file)), url).status_code == 401  # without a secret
    assert send_request(app, url, X_API_Key="wrong").status_code == 401
    assert send_request(app, url, X_API_Key=TOKEN).json() == "gallery ['decode']"


def test_a_link_is_valid_with_and_without_the_prefix_of_a_proxy(file: Path) -> None:
    app = application(Keys.read(file), SECRET)
    app.add_middleware(RequestMiddleware, root_path="/after")
    url = signed_urls.sign(SECRET, "/image", "realism=0.5", int(time.time()) + 60)
    assert send_request(app, f"/after{url}").json() == "link:192.0.2.7 []"
    assert send_request(app, url).status_code == 200
    assert send_request(app, f"/other{url}").status_code == 404
    elsewhere = signed_urls.sign(SECRET, "/after/image", "realism=0.5", int(time.time()) + 60)
    assert send_request(app, elsewhere).status_code == 401


def test_openapi_lists_both_ways_to_send_a_key() -> None:
    document = application(None).openapi()
    assert document["components"]["securitySchemes"].keys() == {"HTTPBearer", "APIKeyHeader"}
    security = document["paths"]["/decodes"]["post"]["security"]
    assert security == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
