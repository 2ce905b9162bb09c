"""HTTP/1.1 on sockets: what uvicorn's parser does not do as this service needs it."""

import asyncio
import contextlib
import functools
import re
import sys
from typing import Any, Literal, cast
from urllib.parse import unquote

import h11
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    HTTPScope,
    Scope,
)
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from service import addresses, metrics, prefix, problems
from service.cli.connections import FLUSH_S, Connections
from service.cli.http_parser import Parser
from service.forwarded import ForwardedFor
from service.requests import HEADERS_TOO_LARGE, MAX_HEADER_BYTES

MAX_FORWARDED = 1024
"""Characters that are read of `X-Forwarded-For`: its end, which trusted proxies have written."""
MAX_QUOTED = 256
"""Longest part of a request that an error repeats."""
_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/@]+)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
"""A request target in absolute form, without its query."""


class _Transport:
    """A transport whose `close` ends within `FLUSH_S`, whether the client reads or not."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self.write, self.is_closing = transport.write, transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def close(self) -> None:
        if not self._transport.is_closing() and self._transport.get_write_buffer_size():
            self._loop.call_later(FLUSH_S, self._transport.abort)
        self._transport.close()


class HttpProtocol(H11Protocol):
    """Uvicorn's protocol on h11, which follows RFC 9112 more strictly than httptools.

    Requests that cannot be parsed get problem documents, like all errors of the API. A client must
    send the headers of a request, and the rest of a body that nobody reads, in time.
    """

    def __init__(self, *args: Any, limits: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Parser(h11.SERVER, MAX_HEADER_BYTES)
        self._limits = limits
        self._awaited: Literal["", "headers", "body"] = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._host = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, or refuse the connection if there are too many."""
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self.loop)))
        self._host = addresses.plain(self.client[0] if self.client else "")
        exceeded = self._limits.add(self._host)
        if exceeded == "total":
            metrics.shed("connections")
            detail = f"all {self._limits.total} connections are in use; try again later"
            self._refuse(503, problems.Busy.kind, detail)
        elif exceeded:
            detail = (
                f"your address has {self._limits.per_address} connections, which is the limit; "
                "close some of them"
            )
            self._refuse(429, problems.TooManyRequests.kind, detail)
        else:
            self._await_client()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._limits.remove(self._host)
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client has sent, in slices while it may be a head, chunks or trailers."""
        parser, at = cast(Parser, self.conn), 0
        while at < len(data):
            end = at + parser.slice(len(data) - at)
            super().data_received(data[at:end])
            if self.transport.is_closing():
                return
            at = end
        self._await_client()

    def on_response_complete(self) -> None:
        """Begin to wait for the rest of a body that was not read."""
        super().on_response_complete()
        self._await_client(idle=True)

    def _await_client(self, idle: bool = False) -> None:
        """Start or stop the timer, by what the client has to send next.

        An `idle` connection, which has sent nothing after a response, has uvicorn's timer.
        """
        awaited: Literal["", "headers", "body"] = ""
        if self.conn.their_state is h11.IDLE and not idle:
            awaited = "headers"
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            awaited = "body"
        if awaited == self._awaited:
            return
        self._stop_waiting()
        if awaited and not self.transport.is_closing():
            self._awaited = awaited
            self._deadline = self.loop.call_later(self._limits.header_timeout_s, self._late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._awaited = None, ""

    def _late(self) -> None:
        """Close a connection whose client has not sent in time what was awaited."""
        if self._awaited == "headers" and self.conn.trailing_data[0]:
            seconds = self._limits.header_timeout_s
            detail = f"the headers did not arrive within {seconds:g} s; send the request again"
            self._refuse(408, problems.RequestTimeout.kind, detail)
        self._stop_waiting()
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Do not log: a client may offer HTTP/2 or WebSocket, and is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        """Answer the request that h11 refuses; uvicorn calls this while it handles the error."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its request cannot be read to the end
            self.cycle.message_event.set()
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        kind = "malformed-request"
        detail = f"the request is not valid HTTP: {str(error)[:MAX_QUOTED]}"
        if status == 431:
            kind, detail = problems.HeadersTooLarge.kind, HEADERS_TOO_LARGE
        self._refuse(status, kind, detail)

    def _refuse(self, status: int, kind: str, detail: str) -> None:
        """Answer with a problem, unless a response has begun, and close the connection."""
        may_answer = self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}
        if may_answer and not self.transport.is_closing():
            retry = status in {429, 503}
            self.transport.write(_answer(status, kind, detail, retry))
        self.transport.close()


@functools.lru_cache(64)
def _answer(status: int, kind: str, detail: str, retry: bool) -> bytes:
    """A problem as it is sent; kept, because thousands of connections may get the same."""
    headers = {"Connection": "close"} | ({"Retry-After": str(problems.RETRY_S)} if retry else {})
    response = problems.problem(status, kind, detail, headers)
    lines = [b"HTTP/1.1 %d %s" % (status, STATUS_PHRASES[status])]
    lines += [b"%s: %s" % header for header in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


class ProxyHeaders(ProxyHeadersMiddleware):
    """Uvicorn's middleware for `X-Forwarded-For` and `-Proto`, and the same for `-Prefix`.

    A prefix counts only if a trusted proxy sends it, once, and it is valid. The client's address is
    found by `ForwardedFor`. Request targets in absolute form, which clients send to proxies, become
    paths (RFC 9112, 3.2.2). IPv4 addresses of proxies
    may be mapped into IPv6. The end of a long `X-Forwarded-For` is read.
    """

    def __init__(self, app: ASGI3Application, trusted_hosts: list[str] | str) -> None:
        super().__init__(app, trusted_hosts)
        trust_all = self.trusted_hosts.always_trust
        self._forwarded_for = ForwardedFor(self.trusted_hosts, trust_all)  # type: ignore[arg-type]

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if scope["type"] == "http":
            scope = _with_path(scope)
            client = scope["client"]
            if client:
                scope["client"] = client = (addresses.plain(client[0]), client[1])
            if (client[0] if client else None) in self.trusted_hosts:
                scope = self._with_address(_with_prefix(_shortened(scope)))
        await super().__call__(scope, receive, send)

    def _with_address(self, scope: HTTPScope) -> HTTPScope:
        """The scope with only the client's address in `X-Forwarded-For`."""
        sent = [v.decode("latin-1") for n, v in scope["headers"] if n == b"x-forwarded-for"]
        if not sent or not scope["client"]:
            return scope
        address = self._forwarded_for.client(sent, scope["client"][0])
        others = [(n, v) for n, v in scope["headers"] if n != b"x-forwarded-for"]
        return {**scope, "headers": [*others, (b"x-forwarded-for", address.encode())]}


def _with_path(scope: HTTPScope) -> HTTPScope:
    """The scope of a request whose target is `http://host/path`, with this path and host."""
    target = _ABSOLUTE.fullmatch(scope["raw_path"] or b"")
    if target is None:
        return scope
    host, raw_path = target["host"], target["path"] or b"/"
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    changed = {
        "headers": [(b"host", host), *headers],
        "raw_path": raw_path,
        "path": unquote(raw_path.decode("ascii")),
    }
    return cast(HTTPScope, {**scope, **changed})


def _with_prefix(scope: HTTPScope) -> HTTPScope:
    """The scope with the path prefix in its headers, if there is one that is valid."""
    sent = [value for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
    if len(sent) == 1:
        with contextlib.suppress(ValueError):
            found = prefix.parse(sent[0].decode("latin-1"))
            return cast(HTTPScope, prefix.prepend(dict(scope), found))
    return scope


def _shortened(scope: HTTPScope) -> HTTPScope:
    """The scope with the last `MAX_FORWARDED` characters of `X-Forwarded-For`."""
    sent = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if sum(map(len, sent)) <= MAX_FORWARDED:
        return scope
    last = b",".join(sent)[-MAX_FORWARDED:].partition(b",")[2]
    others = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-for"]
    return {**scope, "headers": [*others, (b"x-forwarded-for", last)]}
