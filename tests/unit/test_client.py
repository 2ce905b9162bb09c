"""The Python client against answers that are made here."""

import asyncio

import httpx
import pytest

from service.client import AsyncClient


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
