"""Client of the HTTP API: yields the instant picture, then progress, then the final picture.

    with Client("http://127.0.0.1:8000") as client:
        for update in client.decode(data, tier="perceptual"):
            if update.picture:
                show(update.picture)

`AsyncClient` has the same methods as coroutines and async generators.
"""

import contextlib
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from httpx_sse import ServerSentEvent, aconnect_sse

from models.pictures.output_formats import MEDIA_TYPES, OutputFormat
from service.client_batches import AsyncBatches, Batches
from service.client_errors import ApiError, ClientError, DecodeFailed, decode_error
from service.client_objects import AsyncObjects, Objects

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "DecodeFailed", "Update"]

Kind = Literal["draft", "queued", "started", "progress", "preview", "final"]

TIMEOUT_S = 60.0
"""Timeout of connecting and reading. The service sends something on event streams every 15 s."""
ENCODE_TIMEOUT_S = 600.0
"""Timeout of reading the response of an encode. The service may take 190 s for 20 megapixels, its
default limit, and 5 s for each further megapixel."""
RETRIES = 16
"""Failures in a row, about a minute of them, after which the client stops waiting for a decode."""
MAX_PAUSE_S = 60.0
"""Longest wait before a retry, even if `Retry-After` asks for more."""
_RETRYABLE = frozenset({429, 502, 503, 504})
"""Statuses after which a request is retried: 429 if the quota is used up, 502 to 504 if the service
is restarting or overloaded."""


@dataclass(frozen=True, slots=True)
class Update:
    """A change in the state of a decode.

    `picture` is a picture file if `kind` is `draft` (the instant picture), `final` or, unless it
    has expired, `preview`.
    """

    kind: Kind
    picture: bytes | None = None
    step: int = 0
    total: int = 0
    tier: str = "instant"


def _checked(url: httpx.URL) -> httpx.URL:
    """The URL. Raises `ClientError` if its port is too large, which no later step checks."""
    if (url.port or 0) > 65535:
        raise ClientError(f"{url} has port {url.port}; ports are at most 65535")
    return url


def _authorization(api_key: str) -> dict[str, str]:
    """The header with an API key; none without a key. Raises `ClientError`."""
    key = api_key.strip()  # a file's newline is no part of it
    for index, character in enumerate(key):
        if not "!" <= character <= "~":
            message = "keys are ASCII without spaces; copy it again"
            raise ClientError(f"character {index + 1} of the API key is {character!a}; {message}")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _default_http() -> httpx.AsyncClient:
    """A client with the proxies and certificates of the environment. Raises `ClientError`."""
    try:
        return httpx.AsyncClient(timeout=TIMEOUT_S)
    except (ImportError, ValueError, httpx.InvalidURL) as e:  # httpx needs an extra for SOCKS
        names = "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
        raise ClientError(f"the proxy of the environment cannot be used: {e} See {names}.") from e
    except OSError as e:
        names = "SSL_CERT_FILE and SSL_CERT_DIR"
        raise ClientError(f"the certificates cannot be read: {e.strerror}; see {names}") from e


class AsyncClient:
    """Asynchronous client with one connection pool.

    `http` replaces the default `httpx.AsyncClient`, for example to set a transport, proxies or
    timeouts; its `base_url` and API key are set here, and it is closed with this client. Raises
    `ClientError`.
    """

    def __init__(
        self, url: str, api_key: str = "", *, http: httpx.AsyncClient | None = None
    ) -> None:
        headers = _authorization(api_key)
        self._encode_options: dict[str, Any] = {}
        if http is None:
            self._encode_options["timeout"] = httpx.Timeout(TIMEOUT_S, read=ENCODE_TIMEOUT_S)
        self.http = http or _default_http()
        self.http.base_url = _checked(httpx.URL(url))
        self.http.headers.update(headers)
        self.batches = AsyncBatches(self.send, self._retry)
        self.objects = AsyncObjects(self.send, self._retry, self._path, self._encode_options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def decode(
        self,
        data: bytes,
        tier: str = "perceptual",
        *,
        format: OutputFormat = "png",
        previews: bool = True,
        realism: float = 1.0,
        **settings: str | float | None,
    ) -> AsyncGenerator[Update, None]:
        """Decode a bitstream; yields updates, the last of which has the picture of `tier`.

        `settings` are `seed`, `steps`, `eta`, `gamma`, `sampler`, `guidance`, `deadline_s` and, in
        place of `data`, `source`, an object in one of the service's stores. If the caller stops
        iterating, the service continues the decode. Once the decode is accepted, the client
        reconnects while the service or its Redis restarts. Raises `ApiError`, `DecodeFailed`,
        `Canceled`, and `httpx.TransportError` if the service cannot be reached.
        """
        params = {"tier": tier, **{k: v for k, v in settings.items() if v is not None}}
        accept = {"Accept": MEDIA_TYPES[format]}
        response = await self.send(
            "POST", "/v1/decodes", params=params, content=data, headers=accept
        )
        location = self._path(response.headers.get("location", ""))
        response_tier = response.headers["x-afterimage-tier"]
        if not location:
            yield Update("final", response.content, tier=response_tier)
            return
        if response_tier == "instant":
            yield Update("draft", response.content)
            async with contextlib.aclosing(self._follow(location, previews)) as updates:
                async for update in updates:
                    yield update
        # any diffusion tier: an identical job may have been queued under another tier's name
        params = {"min_tier": "perceptual", "realism": realism}
        response = await self._retry("GET", f"{location}/image", params=params, headers=accept)
        yield Update("final", response.content, tier=response.headers["x-afterimage-tier"])

    async def encode(
        self,
        picture: bytes,
        quality: int = 2,
        format: Literal["msh", "compressai"] = "msh",
        **settings: str | None,
    ) -> bytes:
        """Encode a picture file; returns the bitstream. Raises `ApiError`.

        `settings` are `metric`, `model` and, in place of `picture`, `source`. Warns (`UserWarning`)
        if the file is truncated and was encoded as far as it goes.
        """
        chosen = {k: v for k, v in settings.items() if v is not None}
        params = {"quality": quality, "format": format, **chosen}
        response = await self.send(
            "POST", "/v1/encodes", params=params, content=picture, **self._encode_options
        )
        if text := response.headers.get("x-afterimage-warning"):
            warnings.warn(text, stacklevel=2)
        return response.content

    async def inspect(self, data: bytes) -> dict[str, Any]:
        """The fields of a bitstream's header. Raises `ApiError`."""
        header: dict[str, Any] = (await self.send("POST", "/v1/inspect", content=data)).json()
        return header

    async def cancel(self, location: str) -> None:
        """Cancel the decode at `location` for this caller. Raises `ApiError` if it has ended."""
        await self.send("DELETE", self._path(location))

    async def _follow(self, location: str, previews: bool) -> AsyncGenerator[Update, None]:
        """Yield a decode's events as updates until it has succeeded; reconnects on errors."""
        last_id, failures = "0", 0
        while True:
            try:
                async with self._events(location, last_id) as events:
                    async for event in events:
                        last_id, failures = event.id or last_id, 0
                        if event.event == "completed":
                            return
                        update = await self._update(event, previews)
                        if update is not None:
                            yield update
            except (httpx.TransportError, ApiError) as e:
                failures += 1
                await _wait_before_retry(e, failures)
            else:  # the stream ended early: the service or its Redis stopped, or the job has ended
                state = (await self._retry("GET", location)).json()
                if state["status"] in {"failed", "canceled"}:
                    raise decode_error(state["status"], state["error"])
                if state["status"] == "succeeded":
                    return
                failures += 1
                error = httpx.ReadError(f"{location}/events ended early {failures} times in a row")
                await _wait_before_retry(error, failures)

    @contextlib.asynccontextmanager
    async def _events(
        self, location: str, last_id: str
    ) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        """The decode's events after `last_id`, until the block ends. Raises `ApiError`."""
        headers = {"Last-Event-ID": last_id}
        async with aconnect_sse(self.http, "GET", f"{location}/events", headers=headers) as source:
            if not source.response.is_success:
                await source.response.aread()
                raise _api_error(source.response)
            async with contextlib.aclosing(source.aiter_sse()) as events:
                yield events

    async def _update(self, event: ServerSentEvent, previews: bool) -> Update | None:
        """The update for an event, if there is one. Raises an error if the decode has failed."""
        if event.event not in {"queued", "started", "progress", "preview", "failed", "canceled"}:
            return None
        data = event.json()
        if event.event in {"failed", "canceled"}:
            raise decode_error(event.event, data.get("error"))
        picture = None
        if event.event == "preview":
            if not previews:
                return None
            with contextlib.suppress(ApiError):  # expired, or over the quota: others follow
                picture = (await self.send("GET", self._path(data["image"]))).content
        kind: Kind = event.event  # type: ignore[assignment]
        return Update(kind, picture, data.get("step", 0), data.get("total", 0))

    def _path(self, reference: str) -> str:
        """Return `reference`, a path from the service, relative to the path of the base URL."""
        return reference.removeprefix(self.http.base_url.path.rstrip("/"))

    async def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request once. Raises `ApiError` unless the response is a success."""
        response = await self.http.request(method, path, **request)
        if not response.is_success:
            raise _api_error(response)
        return response

    async def _retry(self, method: str, path: str, **request: Any) -> httpx.Response:
        """`_send` with retries after connection errors and `_RETRYABLE` statuses."""
        failures = 0
        while True:
            try:
                return await self.send(method, path, **request)
            except (httpx.TransportError, ApiError) as e:
                failures += 1
                await _wait_before_retry(e, failures)


class Client:
    """Synchronous client: runs `AsyncClient` on an event loop in a background thread."""

    def __init__(self, url: str, api_key: str = "") -> None:
        with ExitStack() as stack:  # stops the thread if the URL is invalid
            self._portal = stack.enter_context(start_blocking_portal())
            client = self._portal.call(AsyncClient, url, api_key)
            self._client: AsyncClient = stack.enter_context(
                self._portal.wrap_async_context_manager(client)
            )
            self._stack = stack.pop_all()
        self.batches = Batches(self._client.batches, self._portal)
        self.objects = Objects(self._client.objects, self._portal)
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._stack.__exit__(kind, error, trace)

    def decode(
        self,
        data: bytes,
        tier: str = "perceptual",
        *,
        format: OutputFormat = "png",
        previews: bool = True,
        realism: float = 1.0,
        **settings: str | float | None,
    ) -> Iterator[Update]:
        """See `AsyncClient.decode`."""
        updates = self._client.decode(
            data, tier, format=format, previews=previews, realism=realism, **settings
        )
        steps = self._portal.call(_Steps, updates)
        try:
            while (update := self._portal.call(steps.next)) is not None:
                yield update
        finally:
            if self._open:  # else the event loop has ended, and closed all generators
                self._portal.call(steps.close)

    def encode(
        self,
        picture: bytes,
        quality: int = 2,
        format: Literal["msh", "compressai"] = "msh",
        **settings: str | None,
    ) -> bytes:
        """See `AsyncClient.encode`."""
        return self._portal.call(lambda: self._client.encode(picture, quality, format, **settings))

    def inspect(self, data: bytes) -> dict[str, Any]:
        """See `AsyncClient.inspect`."""
        return self._portal.call(self._client.inspect, data)

    def cancel(self, location: str) -> None:
        """See `AsyncClient.cancel`."""
        self._portal.call(self._client.cancel, location)


class _Steps:
    """Runs a generator on the event loop, step by step, for a thread that may be interrupted.

    Ctrl-C interrupts the thread while it waits for a step; the step itself continues on the loop.
    An asynchronous generator cannot be closed while it runs, so `close` ends the step first.
    """

    def __init__(self, updates: AsyncGenerator[Update, None]) -> None:
        self._updates = updates
        self._running = anyio.Lock()
        self._step = anyio.CancelScope()
        self._closed = False

    async def next(self) -> Update | None:
        """The next update; None at the end, and after `close`."""
        async with self._running:
            if not self._closed:
                with anyio.CancelScope() as self._step:
                    return await anext(self._updates, None)
        return None

    async def close(self) -> None:
        """Cancel the step that is running, if any, then close the generator."""
        self._closed = True
        self._step.cancel()
        async with self._running:
            await self._updates.aclose()


async def _wait_before_retry(error: httpx.TransportError | ApiError, failures: int) -> None:
    """Sleep before a retry, longer after each failure and at least as long as `Retry-After`.

    Raises `error` if a retry cannot succeed or after `RETRIES` failures.
    """
    retryable = not isinstance(error, ApiError) or error.status in _RETRYABLE
    if failures > RETRIES or not retryable:
        raise error
    retry_after_s = error.retry_after_s if isinstance(error, ApiError) else 0
    await anyio.sleep(min(max(min(0.1 * 2**failures, 5), retry_after_s), MAX_PAUSE_S))


def _api_error(response: httpx.Response) -> ApiError:
    """The exception for a response that is no success."""
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if response.is_redirect:
        problem = {
            "title": f"redirected to {response.headers.get('location')}; use that URL instead"
        }
    retry_after = response.headers.get("retry-after", "")
    return ApiError(
        response.status_code,
        problem if isinstance(problem, dict) else {},
        float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0,
    )
