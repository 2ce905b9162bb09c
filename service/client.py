"""A client of the HTTP API: the draft first, then progress, then the finished picture.

    with Client("http://127.0.0.1:8000") as client:
        for update in client.decode(data, tier="perceptual"):
            if update.picture:
                show(update.picture)

`AsyncClient` is the same for `async for`.
"""

import contextlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from httpx_sse import ServerSentEvent, aconnect_sse

from models.errors import AfterimageError, Canceled
from models.image import MEDIA_TYPES, OutputFormat

Kind = Literal["draft", "queued", "started", "progress", "preview", "final"]

TIMEOUT_S = 60.0
"""For an answer to begin; an event stream is silent for 15 s at most."""
RETRIES = 16
"""How often a decode that was accepted is asked for in vain, one time after the other: a minute."""
MAX_PAUSE_S = 60.0
"""Between two such times, where `Retry-After` asks for more."""
_PASSING = frozenset({429, 502, 503, 504})
"""Answers to what may be asked again later: a quota is used up, or what is behind is restarting."""


class ApiError(AfterimageError):
    """The service refused: a problem document (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any], retry_after_s: float = 0) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or status))
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s


class DecodeFailed(AfterimageError):
    """The decode was queued and then failed."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became known of a decode. `draft` and `final` bring a picture file, and
    `preview` does unless it was gone already."""

    kind: Kind
    picture: bytes | None = None
    step: int = 0
    total: int = 0
    tier: str = "instant"


class AsyncClient:
    """Over one pool of connections; `http` may be brought along, with transport or proxies. It is
    then given `url` and key, and closed with the client."""

    def __init__(
        self, url: str, api_key: str = "", *, http: httpx.AsyncClient | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = http or httpx.AsyncClient(timeout=TIMEOUT_S)
        self.http.base_url = httpx.URL(url)
        self.http.headers.update(headers)

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
        """Decode a bitstream: updates until the picture of `tier` is there.

        `settings` are `seed`, `steps`, `eta`, `gamma`, `sampler`, `guidance`, `deadline_s`. The
        service keeps drawing where the caller stops listening; a decode that was accepted is
        waited for while the service or its Redis restart. Raises `ApiError`, `DecodeFailed`,
        `Canceled`, and `httpx.TransportError` where the service cannot be reached.
        """
        asked = {"tier": tier, **{k: v for k, v in settings.items() if v is not None}}
        accept = {"Accept": MEDIA_TYPES[format]}
        answer = await self._send("POST", "/v1/decodes", params=asked, content=data, headers=accept)
        location = answer.headers.get("location", "")
        drawn = answer.headers["x-afterimage-tier"]
        if not location:
            yield Update("final", answer.content, tier=drawn)
            return
        if drawn == "instant":
            yield Update("draft", answer.content)
            async for update in self._follow(location, previews):
                yield update
        mixed = {"min_tier": "perceptual", "realism": realism}  # the decode may have another's name
        answer = await self._patiently("GET", f"{location}/image", params=mixed, headers=accept)
        yield Update("final", answer.content, tier=answer.headers["x-afterimage-tier"])

    async def encode(
        self, picture: bytes, quality: int = 2, format: Literal["msh", "compressai"] = "msh"
    ) -> bytes:
        """A picture file -> a bitstream. Raises `ApiError`."""
        asked = {"quality": quality, "format": format}
        return (await self._send("POST", "/v1/encodes", params=asked, content=picture)).content

    async def inspect(self, data: bytes) -> dict[str, Any]:
        """What a bitstream's header says. Raises `ApiError`."""
        found: dict[str, Any] = (await self._send("POST", "/v1/inspect", content=data)).json()
        return found

    async def cancel(self, location: str) -> None:
        """Withdraw from the decode at `location`. Raises `ApiError` where it has ended."""
        await self._send("DELETE", location)

    async def _follow(self, location: str, previews: bool) -> AsyncGenerator[Update, None]:
        """Updates from the events of a decode, over broken connections, until it has succeeded."""
        last, failures = "0", 0
        while True:
            try:
                async with aconnect_sse(
                    self.http, "GET", f"{location}/events", headers={"Last-Event-ID": last}
                ) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                        raise _error(source.response)
                    async for event in source.aiter_sse():
                        last, failures = event.id or last, 0
                        if event.event == "completed":
                            return
                        update = await self._update(event, previews)
                        if update is not None:
                            yield update
            except (httpx.TransportError, ApiError) as e:
                failures += 1
                await _pause(e, failures)
            else:  # it ended without an end: before ours, or the service or its Redis stopped
                state = (await self._patiently("GET", location)).json()
                if state["status"] in {"failed", "canceled"}:
                    raise _ended(state["status"], state["error"])
                if state["status"] == "succeeded":
                    return
                failures += 1
                await _pause(httpx.ReadError("the event stream ends again and again"), failures)

    async def _update(self, event: ServerSentEvent, previews: bool) -> Update | None:
        if event.event not in {"queued", "started", "progress", "preview", "failed", "canceled"}:
            return None
        data = event.json()
        if event.event in {"failed", "canceled"}:
            raise _ended(event.event, data.get("error"))
        picture = None
        if event.event == "preview":
            if not previews:
                return None
            with contextlib.suppress(ApiError):  # gone, or one request too many: another follows
                picture = (await self._send("GET", data["image"])).content
        kind: Kind = event.event  # type: ignore[assignment]
        return Update(kind, picture, data.get("step", 0), data.get("total", 0))

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        answer = await self.http.request(method, path, **request)
        if not answer.is_success:
            raise _error(answer)
        return answer

    async def _patiently(self, method: str, path: str, **request: Any) -> httpx.Response:
        """`_send`, again and again while that makes sense."""
        failures = 0
        while True:
            try:
                return await self._send(method, path, **request)
            except (httpx.TransportError, ApiError) as e:
                failures += 1
                await _pause(e, failures)


class Client:
    """`AsyncClient` for code that does not await: an event loop in a thread of its own."""

    def __init__(self, url: str, api_key: str = "") -> None:
        with ExitStack() as stack:  # a thread, which a wrong URL does not leave running
            self._portal = stack.enter_context(start_blocking_portal())
            own = self._portal.call(AsyncClient, url, api_key)
            self._client: AsyncClient = stack.enter_context(
                self._portal.wrap_async_context_manager(own)
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """As `AsyncClient.decode`."""
        updates = self._client.decode(
            data, tier, format=format, previews=previews, realism=realism, **settings
        )
        try:
            while (update := self._portal.call(_next, updates)) is not None:
                yield update
        finally:
            self._portal.call(_close, updates)

    def encode(
        self, picture: bytes, quality: int = 2, format: Literal["msh", "compressai"] = "msh"
    ) -> bytes:
        """As `AsyncClient.encode`."""
        return self._portal.call(self._client.encode, picture, quality, format)

    def inspect(self, data: bytes) -> dict[str, Any]:
        """As `AsyncClient.inspect`."""
        return self._portal.call(self._client.inspect, data)

    def cancel(self, location: str) -> None:
        """As `AsyncClient.cancel`."""
        self._portal.call(self._client.cancel, location)


async def _next(updates: AsyncGenerator[Update, None]) -> Update | None:
    return await anext(updates, None)


async def _close(updates: AsyncGenerator[Update, None]) -> None:
    await updates.aclose()


def _ended(status: str, error: str | None) -> AfterimageError:
    if status == "canceled":
        return Canceled("the decode was canceled")
    return DecodeFailed(error or "the decode failed")


async def _pause(error: httpx.TransportError | ApiError, failures: int) -> None:
    """Wait before the next time, the longer the more have failed; raises what will not pass."""
    passing = not isinstance(error, ApiError) or error.status in _PASSING
    if failures > RETRIES or not passing:
        raise error
    asked = error.retry_after_s if isinstance(error, ApiError) else 0
    await anyio.sleep(min(max(min(0.1 * 2**failures, 5), asked), MAX_PAUSE_S))


def _error(answer: httpx.Response) -> ApiError:
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    if answer.is_redirect:
        problem = {"title": f"redirected to {answer.headers.get('location')}"}
    later = answer.headers.get("retry-after", "")
    return ApiError(
        answer.status_code,
        problem if isinstance(problem, dict) else {},
        float(later) if later.isascii() and later.isdigit() else 0,
    )
