"""The protocol on sockets, in a real server with a small application."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from service.cli import api_server, listening
from service.cli.api_server import ApiServer, configuration
from service.cli.http_protocol import ProxyHeaders
from service.cli.listening import CannotListen
from service.requests import MAX_HEADER_BYTES, RequestMiddleware

app = FastAPI()
app.add_middleware(RequestMiddleware)


@app.post("/echo")
async def echo(request: Request) -> dict[str, object]:
    return {"body": (await request.body()).decode(), "key": request.headers.get("x-api-key")}


@app.get("/events")
async def events() -> StreamingResponse:
    async def stream() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        yield "data: 2\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


@app.get("/root")
async def root(request: Request) -> dict[str, object]:
    return {"root": request.scope["root_path"], "client": request.scope["client"][0]}


@app.get("/url/{rest:path}")
async def url(request: Request) -> dict[str, str]:
    return {"path": request.path_params["rest"], "url": str(request.url)}


@contextlib.contextmanager
def served(keep_alive_s: int) -> Iterator[int]:
    """Run `app` in a real server; yield its port."""
    config = configuration(app, keep_alive_s)
    config.lifespan = "off"
    sockets = listening.bind("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=(sockets,))
    port = sockets[0].getsockname()[1]
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(keep_alive_s=60) as port:
        yield port


def exchange(port: int, sent: bytes) -> tuple[bytes, bytes]:
    """Send bytes; return head and body of what the server answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(sent)
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
    return head, body


def post(*headers: str, body: bytes = b"0123456789") -> bytes:
    lines = ["POST /echo HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0"])
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(
    port: int, offer: str, caplog: pytest.LogCaptureFixture
) -> None:
    head, body = exchange(port, post(f"Upgrade: {offer}", "Connection: Upgrade, close"))
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["body"] == "0123456789"
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


@pytest.mark.parametrize(
    ("target", "path", "url"),
    [
        ("http://b:81/url/a%20b?c=d", "a b", "http://b:81/url/a b?c=d"),
        ("HTTP://b/url/c", "c", "http://b/url/c"),
        ("/url/http://c", "http://c", "http://a/url/http://c"),
    ],
)
def test_a_request_target_in_absolute_form_is_routed_by_its_path(
    port: int, target: str, path: str, url: str
) -> None:
    """As clients write it that take the service for a proxy; its host replaces `Host`."""
    request = f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    _, body = exchange(port, request.encode())
    assert json.loads(body) == {"path": path, "url": url}


@pytest.mark.parametrize("value", ["key", " key", "key ", "key\t", "\t key \t "])
def test_white_space_around_a_header_is_no_part_of_its_value(port: int, value: str) -> None:
    _, body = exchange(port, post(f"X-API-Key:{value}", "Connection: close"))
    assert json.loads(body)["key"] == "key"


def test_a_stream_for_http_1_0_is_not_chunked(port: int) -> None:
    head, body = exchange(port, b"GET /events HTTP/1.0\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"data: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        (b"no request at all\r\n\r\n", 400, "malformed-request"),
        (b"GET /root HTTP/1.1\r\n\r\n", 400, "malformed-request"),  # no Host
        (post("Transfer-Encoding: gzip"), 501, "malformed-request"),
        (b"GET /" + MAX_HEADER_BYTES * b"a", 431, "headers-too-large"),
    ],
)
def test_what_is_no_http_gets_a_problem(port: int, sent: bytes, status: int, kind: str) -> None:
    head, body = exchange(port, sent)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    assert json.loads(body)["type"] == f"urn:afterimage:problem:{kind}"


def test_a_body_that_is_no_http_ends_the_connection_and_the_request(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    head, _ = exchange(port, chunked + b"no length\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("at_once", [True, False])
def test_headers_beyond_the_limit_are_refused_however_they_arrive(port: int, at_once: bool) -> None:
    large = [f"X-{n}: {'a' * 1000}" for n in range(80)]
    sent = post(*large, "Connection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):  # it may close before all is sent
            for part in [sent] if at_once else [sent[:70_000], sent[70_000:]]:
                client.sendall(part)
                time.sleep(0 if at_once else 0.2)
        assert client.recv(65536).startswith(b"HTTP/1.1 431 ")
    just_below = [f"X-{n}: {'a' * 1000}" for n in range(60)]
    assert exchange(port, post(*just_below, "Connection: close"))[0].startswith(b"HTTP/1.1 200")


def test_an_idle_connection_stays_open_for_the_configured_time() -> None:
    request = b"GET /root HTTP/1.1\r\nHost: a\r\n\r\n"
    with (
        served(keep_alive_s=1) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        for _ in range(2):
            client.sendall(request)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
        before = time.monotonic()
        assert client.recv(65536) == b""
        assert 0.3 < time.monotonic() - before


def test_a_port_that_was_taken_while_models_were_loaded_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api_server, "create_app", lambda _settings: FastAPI())
    (bound,) = listening.bind("127.0.0.1", 0)
    with bound, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(bound.getsockname())
        other.listen()
        with pytest.raises(CannotListen, match="in use; choose another with --port"):
            ApiServer(lambda: None).run([bound])


def forwarded(peer: str, *prefixes: str, client: str = "192.0.2.7") -> dict[str, str]:
    """What the application sees of a request that comes from `peer`."""
    sent = [("X-Forwarded-For", client), *(("X-Forwarded-Prefix", p) for p in prefixes)]
    headers = httpx.Headers(sent, encoding="latin-1")

    async def once() -> dict[str, str]:
        transport = httpx.ASGITransport(ProxyHeaders(app, "10.0.0.0/8"), client=(peer, 1))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            seen: dict[str, str] = (await client.get("/root", headers=headers)).json()
            return seen

    return asyncio.run(once())


def test_a_path_prefix_counts_only_from_trusted_proxies() -> None:
    assert forwarded("10.1.2.3", "/after") == {"root": "/after", "client": "192.0.2.7"}
    assert forwarded("10.1.2.3", "/a/b/") == {"root": "/a/b", "client": "192.0.2.7"}
    assert forwarded("203.0.113.1", "/after") == {"root": "", "client": "203.0.113.1"}


@pytest.mark.parametrize(
    "prefix",
    ["after", "//evil.example", "/a//b", "/..", "/a/./b", "/a?b", "/a b", "/a%2e", "/a,/b",
     "/" + "a" * 300, "/\xe4"],
)  # fmt: skip
def test_an_invalid_path_prefix_is_ignored(prefix: str) -> None:
    assert forwarded("10.1.2.3", prefix)["root"] == ""


def test_several_path_prefixes_are_ignored() -> None:
    assert forwarded("10.1.2.3", "/a", "/b")["root"] == ""


def test_a_proxy_may_connect_with_an_address_that_is_mapped_into_ipv6() -> None:
    assert forwarded("::ffff:10.1.2.3", "/a") == {"root": "/a", "client": "192.0.2.7"}


def test_text_that_is_no_address_does_not_become_a_caller(port: int) -> None:
    """Each of these requests would otherwise have a quota of its own."""
    seen = set()
    for text in ("unknown", "a", "b, c", "1.2.3.4.5", "_hidden", "1.2.3.4:x", "[::1", "10.0.0.1 x"):
        request = f"GET /root HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {text}\r\n"
        _, body = exchange(port, f"{request}Connection: close\r\n\r\n".encode())
        seen.add(json.loads(body)["client"])
    assert seen == {"127.0.0.1"}
