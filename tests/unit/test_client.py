"""The Python client against answers that are made here."""

import asyncio

import httpx
import pytest

from service.client import AsyncClient, ClientError


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
        async with AsyncClient(base, http=http) as client:
            updates = [update async for update in client.decode(b"bitstream")]
            await client.cancel(f"{sent}/v1/decodes/1")
            return updates[-1].picture

    assert asyncio.run(decode_and_cancel()) == b"picture"
    assert asked == [
        "POST /after/v1/decodes", "GET /after/v1/decodes/1/image", "DELETE /after/v1/decodes/1",
    ]  # fmt: skip


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
