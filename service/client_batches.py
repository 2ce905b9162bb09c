"""The batches of `service.client`: `client.batches.submit(…)`.

    with Client("http://127.0.0.1:8000") as client:
        batch = client.batches.submit(source="store:in/a/", target="store:out/b/", format="webp")
        for batch in client.batches.follow(batch["id"]):
            print(batch["counts"])

The documents are those of `/v1/batches`.
"""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx
from anyio.from_thread import BlockingPortal

FOLLOW_S = 2.0
"""Interval at which a batch is looked at while it is followed."""
Document = dict[str, Any]
Send = Callable[..., Awaitable[httpx.Response]]


class AsyncBatches:
    """Requests about batches. `send` sends a request once, `retry` until it succeeds."""

    def __init__(self, send: Send, retry: Send) -> None:
        self._send, self._retry = send, retry

    async def submit(self, **request: Any) -> Document:
        """Submit a batch: `items`, or the prefixes `source` and `target`; and settings.

        Fields that are None are left out. It is sent again after connection errors, which adds no
        second batch. Raises `ApiError`.
        """
        body = {name: value for name, value in request.items() if value is not None}
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return _document(await self._retry("POST", "/v1/batches", json=body, headers=headers))

    async def status(self, id: str, after: int = -1, limit: int = 100) -> Document:
        """The state of a batch, with `limit` failed items whose number is above `after`."""
        params = {"after": after, "limit": limit}
        return _document(await self._retry("GET", f"/v1/batches/{id}", params=params))

    async def list(self) -> AsyncGenerator[Document, None]:
        """The batches that the caller may see, newest first, without their failed items."""
        params: dict[str, Any] | None = {"limit": 100}
        while params is not None:
            page = _document(await self._retry("GET", "/v1/batches", params=params))
            for batch in page["batches"]:
                yield batch
            params = {**params, "after": page["batches"][-1]["id"]} if page["next"] else None

    async def failed(self, id: str) -> AsyncGenerator[Document, None]:
        """All failed items of a batch, page by page."""
        after: int | None = -1
        while after is not None:
            page = await self.status(id, after, 1000)
            for item in page["failed"]:
                yield item
            after = page["failed"][-1]["number"] if page["next"] else None

    async def follow(self, id: str, seconds: float = FOLLOW_S) -> AsyncGenerator[Document, None]:
        """Yield the state of a batch every so many seconds; the last one is that at its end."""
        while True:
            batch = await self.status(id, limit=0)
            yield batch
            if batch["status"] != "running":
                return
            await anyio.sleep(seconds)

    async def cancel(self, id: str) -> Document:
        """Cancel what has not begun. Raises `ApiError` if the batch has ended."""
        return _document(await self._send("DELETE", f"/v1/batches/{id}"))

    async def retry(self, id: str) -> Document:
        """Take the failed items again. Raises `ApiError` if there are none."""
        return _document(await self._send("POST", f"/v1/batches/{id}/retry"))


class Batches:
    """The same for threads: runs `AsyncBatches` on the event loop of a client."""

    def __init__(self, batches: AsyncBatches, portal: BlockingPortal) -> None:
        self._batches, self._portal = batches, portal

    def submit(self, **request: Any) -> Document:
        """See `AsyncBatches.submit`."""
        return self._portal.call(lambda: self._batches.submit(**request))

    def status(self, id: str, after: int = -1, limit: int = 100) -> Document:
        """See `AsyncBatches.status`."""
        return self._portal.call(self._batches.status, id, after, limit)

    def list(self) -> Iterator[Document]:
        """See `AsyncBatches.list`."""
        return self._each(self._batches.list())

    def failed(self, id: str) -> Iterator[Document]:
        """See `AsyncBatches.failed`."""
        return self._each(self._batches.failed(id))

    def follow(self, id: str, seconds: float = FOLLOW_S) -> Iterator[Document]:
        """See `AsyncBatches.follow`."""
        return self._each(self._batches.follow(id, seconds))

    def cancel(self, id: str) -> Document:
        """See `AsyncBatches.cancel`."""
        return self._portal.call(self._batches.cancel, id)

    def retry(self, id: str) -> Document:
        """See `AsyncBatches.retry`."""
        return self._portal.call(self._batches.retry, id)

    def _each(self, documents: AsyncGenerator[Document, None]) -> Iterator[Document]:
        async def next_one() -> Document | None:
            return await anext(documents, None)

        while (document := self._portal.call(next_one)) is not None:
            yield document


def _document(response: httpx.Response) -> Document:
    document: Document = response.json()
    return document
