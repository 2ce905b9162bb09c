"""The Python client against answers that are made here."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from service import client
from service.client import AsyncClient, Client, ClientError
from service.settings import ServiceSettings


@pytest.mark.parametrize("sent", ["/after", ""])
@pytest.mark.parametrize("base", ["https://host/after", "https://host/after/"])
def test_locations_with_and_without_the_path_of_the_base_url_are_followed(
    base: str, sent: str
) -> None:
    """A service behind a proxy may know the prefix under which it is reached, or not."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        headers = {"Location": f"{sent}/v1/decodes/1", "X-Afterimage-Tier": "perceptual"}
        return httpx.Response(200, headers=headers, content=b"picture")

    async def decode_and_cancel() -> bytes | None:
        http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        async with AsyncClient(base, http=http) as connected:
            updates = [update async for update in connected.decode(b"bitstream")]
            await connected.cancel(f"{sent}/v1/decodes/1")
            return updates[-1].picture

    assert asyncio.run(decode_and_cancel()) == b"picture"
    assert asked == [
        "POST /after/v1/decodes", "GET /after/v1/decodes/1/image", "DELETE /after/v1/decodes/1",
    ]  # fmt: skip


class SlowHandler(BaseHTTPRequestHandler):
    """Answers each request after 0.5 s; the photograph of an encode was truncated."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.5)
        body = b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.path.startswith("/v1/encodes"):
            self.send_header("X-Afterimage-Warning", "pixels are missing")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has given up
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_encodes_may_take_longer_than_other_requests(
    slow_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    with Client(slow_url) as connected:
        with pytest.warns(UserWarning, match="pixels are missing"):
            assert connected.encode(b"photograph") == b"{}"
        with pytest.raises(httpx.ReadTimeout):
            connected.inspect(b"bitstream")
        monkeypatch.setattr(client, "ENCODE_TIMEOUT_S", 0.2)
    with Client(slow_url) as connected, pytest.raises(httpx.ReadTimeout):
        connected.encode(b"photograph")


def test_the_timeouts_of_the_given_http_client_are_kept(slow_url: str) -> None:
    async def encode() -> None:
        async with AsyncClient(slow_url, http=httpx.AsyncClient(timeout=0.2)) as connected:
            await connected.encode(b"photograph")

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(encode())


def test_the_client_waits_longer_than_the_service_takes_for_the_largest_picture() -> None:
    """Waiting for a thread, reading, and encoding each have a deadline."""
    settings = ServiceSettings()
    encoding_s = settings.encode_megapixel_s * settings.max_pixels / 1e6
    assert client.ENCODE_TIMEOUT_S > 3 * settings.request_timeout_s + encoding_s
    assert client.TIMEOUT_S > settings.request_timeout_s


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1", "Unknown scheme for proxy URL"),
        ("HTTP_PROXY", "http://127.0.0.1:port", "Invalid port"),
        ("SSL_CERT_FILE", "/nothing.pem", "No such file or directory; see SSL_CERT_FILE"),
    ],
)
def test_settings_of_the_environment_that_cannot_be_used_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ClientError, match=message) as error:
        AsyncClient("http://host")
    assert variable in str(error.value)


@pytest.mark.parametrize("key", ["\u201ckey\u201d", "a\nb", "a b", "k\xe9y"])
def test_an_api_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ClientError, match="copy it again") as error:
        AsyncClient("http://host", key)
    assert key not in str(error.value)


def test_white_space_around_an_api_key_is_ignored() -> None:
    assert AsyncClient("http://host", " key\n").http.headers["authorization"] == "Bearer key"


def test_a_port_beyond_the_range_is_refused() -> None:
    with pytest.raises(ClientError, match="has port 99999; ports are at most 65535"):
        AsyncClient("http://host:99999")
