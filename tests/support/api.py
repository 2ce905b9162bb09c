"""The API in the tests' own process, without sockets."""

import contextlib
from collections.abc import Iterator

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI

from service.app import create_app
from service.settings import ServiceSettings


class AppTransport(httpx.BaseTransport):
    """Sends requests to an ASGI application whose event loop runs in another thread."""

    def __init__(self, app: FastAPI, portal: BlockingPortal) -> None:
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._portal = portal

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._portal.call(self._send, request, request.read())

    async def _send(self, request: httpx.Request, body: bytes) -> httpx.Response:
        sent = httpx.Request(request.method, request.url, headers=request.headers, content=body)
        response = await self._transport.handle_async_request(sent)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        content = b"".join([chunk async for chunk in response.stream])
        return httpx.Response(response.status_code, headers=response.headers, content=content)


@contextlib.contextmanager
def run_app(settings: ServiceSettings) -> Iterator[httpx.Client]:
    """Start the application, and return a client for it. No workers are started."""
    app = create_app(settings)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.router.lifespan_context(app)),
        httpx.Client(transport=AppTransport(app, portal), base_url="http://localhost") as client,
    ):
        yield client
