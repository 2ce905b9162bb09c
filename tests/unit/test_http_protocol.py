"""The protocol on sockets, in a real server with a small application."""

import asyncio
import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from uvicorn.server import ServerState

from service import requests
from service.cli import api_server, http_protocol, listening
from service.cli.api_server import ApiServer, configuration
from service.cli.http_protocol import MAX_FORWARDED, ProxyHeaders
from service.cli.listening import CannotListen
from service.requests import MAX_HEADER_BYTES, MAX_HEADER_LINES, RequestMiddleware
from service.settings import ServiceSettings
from service.turns import MAX_ACCEPTED
from tests.support.waiting import until

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


@app.get("/large")
async def large() -> Response:
    return Response(bytes(2**26))


released = threading.Event()
"""What the event loop waits for in `/hold`."""
begun: list[str] = []
"""The clients of the requests to `/begin`, in the order in which these began."""


@app.get("/hold")
async def hold() -> None:
    released.wait(20)


@app.get("/begin")
async def begin(request: Request) -> None:
    begun.append(request.scope["client"][0])


@contextlib.contextmanager
def served(**settings: float) -> Iterator[int]:
    """Run `app` in a real server; yield its port."""
    with running_server(**settings) as (port, _):
        yield port


@contextlib.contextmanager
def running_server(**settings: float) -> Iterator[tuple[int, ServerState]]:
    """Run `app` in a real server; yield its port and what it knows of its connections."""
    config = configuration(app, ServiceSettings.model_validate(settings))
    config.lifespan = "off"
    sockets = listening.bind("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=(sockets,))
    port = sockets[0].getsockname()[1]
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port, server.server_state
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as port:
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


def test_a_small_body_may_come_in_chunks_of_one_byte(port: int) -> None:
    head = (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    sent, body = exchange(port, head + b"1\r\nX\r\n" * 1000 + b"0\r\n\r\n")
    assert sent.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["body"] == "X" * 1000


@pytest.mark.parametrize("empty", [b"\r\n", b"\n", b"\r\n\r\n"])
def test_empty_lines_before_a_request_are_skipped(port: int, empty: bytes) -> None:
    """Some clients send one behind a body (RFC 9112, 2.2)."""
    sent = post(), empty, post("Connection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for part in sent:
            client.sendall(part)
            time.sleep(0.05)
        answers = b"".join(iter(lambda: client.recv(65536), b""))
    assert answers.count(b"HTTP/1.1 200") == 2


def test_a_connection_is_closed_after_a_request_with_two_lengths(port: int) -> None:
    """Servers that believe different lengths would find different requests behind it."""
    chunked = b"a\r\n0123456789\r\n0\r\n\r\n"
    head, body = exchange(port, post("Transfer-Encoding: chunked", body=chunked) + post())
    assert head.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["body"] == "0123456789"


@pytest.mark.parametrize("line", ["PRI * HTTP/2.0", "GET /url/a HTTP/3.0", "GET /url/a HTTP/0.9"])
def test_another_version_of_http_is_refused(port: int, line: str) -> None:
    head, body = exchange(port, f"{line}\r\nHost: a\r\n\r\nSM\r\n\r\n".encode())
    assert head.startswith(b"HTTP/1.1 505 ")
    assert "use HTTP/1.1, not " in json.loads(body)["detail"]


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


def test_headers_of_too_many_lines_are_refused_before_they_are_parsed(port: int) -> None:
    lines = [f"X-{n}: a" for n in range(MAX_HEADER_LINES)]
    head, body = exchange(port, post(*lines, "Connection: close"))
    assert head.startswith(b"HTTP/1.1 431 ")
    assert "256 lines" in json.loads(body)["detail"]
    assert exchange(port, post(*lines[10:], "Connection: close"))[0].startswith(b"HTTP/1.1 200")


TRICKLES = {
    "header lines": b"a:b\r\n" * 13_000,
    "one header": b"a" * 2**16,
    "a query": b"",
    "trailers": b"0\r\n" + b"a:b\r\n" * 13_000,
    "a chunk extension": b"1;" + b"a" * 2**16,
    "chunks of one byte": b"1\r\nX\r\n" * 10_000,
}


@pytest.mark.parametrize("endless", TRICKLES)
def test_endless_requests_are_refused_within_moments(port: int, endless: str) -> None:
    chunked = "Transfer-Encoding: chunked\r\n\r\n"
    begin = f"POST /echo HTTP/1.1\r\nHost: a\r\n{'' if 'header' in endless else chunked}".encode()
    if endless == "a query":
        begin, endless = b"GET /?", "one header"
    sent, began = 0, time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(begin)
            while sent < 2**25:
                client.sendall(TRICKLES[endless])
                sent += len(TRICKLES[endless])
        with contextlib.suppress(ConnectionError):
            assert client.recv(65536)[9:12] in {b"431", b"400"}
    assert sent < 2**25 and time.monotonic() - began < 5


def test_refused_headers_and_chunks_block_others_for_milliseconds(port: int) -> None:
    """The parser alone takes 0.4 to 1 s for these, in which no other request is answered."""
    stop = threading.Event()
    chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    attacks = (
        post(*(["a:b"] * 60_000)),
        chunked + b"1\r\nX\r\n" * 40_000,
        chunked + b"0\r\n" + b"a:b\r\n" * 60_000 + b"\r\n",
    )

    def attack() -> None:
        while not stop.is_set():
            for sent in attacks:
                with contextlib.suppress(OSError):
                    exchange(port, sent)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        spent = []
        for _ in range(30):
            began = time.monotonic()
            exchange(port, b"GET /root HTTP/1.0\r\n\r\n")
            spent.append(time.monotonic() - began)
    finally:
        stop.set()
        attacker.join()
    assert statistics.median(spent) < 0.15


HALF = b"GET /root HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("first", "drip", "answer"),
    [
        (b"", b"", b""),  # silent
        (HALF, b"", b"HTTP/1.1 408 "),
        (HALF, b"a:b\r\n", b"HTTP/1.1 408 "),
        (HALF + b"\r\n" + HALF, b"a:b\r\n", b"HTTP/1.1 200 "),  # the second request
        (post(body=b"")[:-4].replace(b": 0", b": 99999") + b"\r\n\r\n", b"x", b"HTTP/1.1 404 "),
        (HALF + b"Content-Length: 99999\r\nExpect: 100-continue\r\n\r\n", b"x", b"HTTP/1.1 200 "),
    ],
)
def test_slow_requests_end_at_the_deadline(first: bytes, drip: bytes, answer: bytes) -> None:
    first = first.replace(b"POST /echo", b"POST /none")
    with (
        served(header_timeout_s=0.5) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        began, received = time.monotonic(), b""
        client.sendall(first)
        client.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5:
                with contextlib.suppress(TimeoutError):
                    data = client.recv(65536)
                    received += data
                    if not data:
                        break
                client.sendall(drip)
        assert 0.4 < time.monotonic() - began < 3
    assert received.startswith(answer) and bool(received) == bool(answer)


def test_a_slow_request_in_time_is_answered_and_its_connection_kept() -> None:
    with (
        served(header_timeout_s=1) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        for _ in range(2):
            client.sendall(HALF)
            time.sleep(0.6)
            client.sendall(b"\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)
        time.sleep(0.6)
        client.sendall(HALF + b"\r\n")  # idle connections have another timeout
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_closed_connection_is_cut_although_its_client_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "FLUSH_S", 0.3)
    monkeypatch.setattr(requests, "SEND_S", 0.3)
    server = running_server()
    with server as (port, state), socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: state.connections, "the connection")
        until(lambda: not state.connections, "the end of the connection")


def test_connections_of_one_address_are_limited_and_counted_until_they_end() -> None:
    with served(connections_per_address=2) as port, contextlib.ExitStack() as opened:

        def connect(address: str) -> socket.socket:
            made = socket.create_connection(("127.0.0.1", port), 20, (address, 0))
            return opened.enter_context(made)

        def status(client: socket.socket) -> bytes:
            with contextlib.suppress(ConnectionError):
                client.sendall(HALF + b"\r\n")
            return client.recv(65536)[9:12]

        first, second = connect("127.0.0.2"), connect("127.0.0.2")
        assert [status(first), status(second)] == [b"200", b"200"]
        refused = connect("127.0.0.2").recv(65536)
        assert refused.startswith(b"HTTP/1.1 429 ") and b"retry-after: 5" in refused
        assert b"your address has 2 connections" in refused
        assert status(connect("127.0.0.3")) == b"200"  # another address
        assert [status(connect("127.0.0.1")) for _ in range(4)] == [b"200"] * 4  # a trusted proxy
        first.close()
        until(lambda: status(connect("127.0.0.2")) == b"200", "a connection is free again")


def test_connections_beyond_the_total_are_refused_with_503() -> None:
    with served(connections=2) as port, contextlib.ExitStack() as opened:
        clients = [
            opened.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            for _ in range(3)
        ]
        answer = clients[2].recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"all 2 connections are in use" in answer
        clients[0].sendall(HALF + b"\r\n")
        assert clients[0].recv(65536).startswith(b"HTTP/1.1 200")


def test_a_port_that_was_taken_while_models_were_loaded_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api_server, "create_app", lambda _settings, _host: FastAPI())
    (bound,) = listening.bind("127.0.0.1", 0)
    with bound, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(bound.getsockname())
        other.listen()
        with pytest.raises(CannotListen, match="in use; choose another with --port"):
            ApiServer(lambda: None).run([bound])


def forwarded(
    peer: str, *prefixes: str, before: str = "", sent: str = "192.0.2.7"
) -> dict[str, str]:
    """What the application sees of a request that comes from `peer`."""
    names = [("X-Forwarded-For", value) for value in (before, sent) if value]
    names += [("X-Forwarded-Prefix", prefix) for prefix in prefixes]
    headers = httpx.Headers(names, encoding="latin-1")

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


def test_an_ipv4_address_that_is_mapped_into_ipv6_is_the_same_address() -> None:
    assert forwarded("::ffff:10.1.2.3", "/after") == {"root": "/after", "client": "192.0.2.7"}
    assert forwarded("::ffff:203.0.113.1") == {"root": "", "client": "203.0.113.1"}


def test_the_end_of_a_long_list_of_proxies_counts() -> None:
    long = ", ".join(f"10.0.{n // 250}.{n % 250}" for n in range(4000))
    began = time.process_time()
    assert forwarded("10.1.2.3", before=f"198.51.100.1, {long}")["client"] == "192.0.2.7"
    seen = forwarded("10.1.2.3", before="192.0.2.7", sent=long)["client"]
    assert seen.startswith("10.0.15.") and len(long) > MAX_FORWARDED
    assert time.process_time() - began < 0.2


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


def test_hundreds_of_requests_that_arrive_together_do_not_delay_another_client() -> None:
    """It may have to wait until all connections before its own are accepted, one at a time."""
    count = 150
    with served() as port, contextlib.ExitStack() as opened:

        def get(path: bytes, address: str) -> socket.socket:
            client = opened.enter_context(
                socket.create_connection(("127.0.0.1", port), 20, (address, 0))
            )
            client.sendall(b"GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
            return client

        held = get(b"/hold", "127.0.0.2")
        time.sleep(0.2)  # it holds the event loop
        sent = [get(b"/begin", "127.0.0.2") for _ in range(count)]
        sent.append(get(b"/begin", "127.0.0.3"))
        released.set()
        for client in (held, *sent):
            assert client.recv(12) == b"HTTP/1.1 200"
    assert len(begun) == count + 1
    assert begun.index("127.0.0.3") <= count // MAX_ACCEPTED + 3
