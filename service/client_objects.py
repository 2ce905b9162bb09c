"""Objects in the service's stores, of `service.client`: `client.objects.decode(…)`.

    with Client("http://127.0.0.1:8000") as client:
        for decode in client.objects.decode("store:out/a.webp", source="store:in/a.msh"):
            print(decode["status"])

The documents are those of `/v1/decodes` and `/v1/encodes`.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import httpx
from anyio.from_thread import BlockingPortal

from service.client_errors import decode_error

WAIT_S = 1
"""How long one request for a status waits for the end of the decode."""
Document = dict[str, Any]
Send = Callable[..., Awaitable[httpx.Response]]


class AsyncObjects:
    """Requests that write to a store. `send` sends a request once, `retry` until it succeeds."""

    def __init__(
        self,
        send: Send,
        retry: Send,
        path: Callable[[str], str],
        encode_options: Mapping[str, Any],
    ) -> None:
        self._send, self._retry, self._path = send, retry, path
        self._encode_options = encode_options

    async def decode(
        self, target: str, data: bytes = b"", tier: str = "perceptual", **settings: Any
    ) -> AsyncGenerator[Document, None]:
        """Write the picture of a bitstream, `data` or the object `source`, to the object `target`.

        Yields status documents, the last one once the picture is written; for the tier `instant`,
        one that tells what was written. `settings` are those of `AsyncClient.decode`, `source` and
        `format`. Raises `ApiError`, `DecodeFailed`, `Canceled`.
        """
        params = {name: value for name, value in settings.items() if value is not None}
        params |= {"target": target, "tier": tier}
        response = await self._send("POST", "/v1/decodes", params=params, content=data)
        yield (document := _document(response))
        location = self._path(response.headers.get("location", ""))
        while location and document["status"] != "succeeded":
            if document["status"] in {"failed", "canceled"}:
                raise decode_error(document["status"], document["error"])
            prefer = {"Prefer": f"wait={WAIT_S}"}
            yield (document := _document(await self._retry("GET", location, headers=prefer)))

    async def encode(self, target: str, picture: bytes = b"", **settings: Any) -> Document:
        """Write the bitstream of a photograph, `picture` or the object `source`, to the object
        `target`; returns a document that tells what was written.

        `settings` are those of `AsyncClient.encode` and `source`. Raises `ApiError`.
        """
        params = {name: value for name, value in settings.items() if value is not None}
        params["target"] = target
        response = await self._send(
            "POST", "/v1/encodes", params=params, content=picture, **self._encode_options
        )
        return _document(response)


class Objects:
    """The same for threads: runs `AsyncObjects` on the event loop of a client."""

    def __init__(self, objects: AsyncObjects, portal: BlockingPortal) -> None:
        self._objects, self._portal = objects, portal

    def decode(
        self, target: str, data: bytes = b"", tier: str = "perceptual", **settings: Any
    ) -> Iterator[Document]:
        """See `AsyncObjects.decode`."""
        documents = self._objects.decode(target, data, tier, **settings)

        async def next_one() -> Document | None:
            return await anext(documents, None)

        while (document := self._portal.call(next_one)) is not None:
            yield document

    def encode(self, target: str, picture: bytes = b"", **settings: Any) -> Document:
        """See `AsyncObjects.encode`."""
        return self._portal.call(lambda: self._objects.encode(target, picture, **settings))


def _document(response: httpx.Response) -> Document:
    document: Document = response.json()
    return document
