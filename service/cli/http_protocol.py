"""HTTP/1.1 on sockets: what uvicorn's parser does not do as this service needs it."""

import contextlib
import re
import sys
from typing import cast
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

from service import addresses, prefix, problems
from service.forwarded import ForwardedFor
from service.requests import MAX_HEADER_BYTES

_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/@]+)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
"""A request target in absolute form, without its query."""


class HttpProtocol(H11Protocol):
    """Uvicorn's protocol on h11, which follows RFC 9112 more strictly than httptools.

    Requests that cannot be parsed get problem documents, like all errors of the API.
    """

    def _unsupported_upgrade_warning(self) -> None:
        """Do not log: a client may offer HTTP/2 or WebSocket, and is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        """Answer the request that h11 refuses; uvicorn calls this while it handles the error."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its request cannot be read to the end
            self.cycle.message_event.set()
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self._send_problem(sys.exception())
        self.transport.close()

    def _send_problem(self, error: BaseException | None) -> None:
        status = getattr(error, "error_status_hint", 400)
        kind, detail = "malformed-request", f"the request is not valid HTTP: {error}"
        if status == 431:
            kind = problems.HeadersTooLarge.kind
            detail = f"the request line and headers exceed {MAX_HEADER_BYTES} bytes; shorten them"
        response = problems.problem(status, kind, detail, {"Connection": "close"})
        head = h11.Response(
            status_code=status, headers=response.raw_headers, reason=STATUS_PHRASES[status]
        )
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


class ProxyHeaders(ProxyHeadersMiddleware):
    """Uvicorn's middleware for `X-Forwarded-For` and `-Proto`, and the same for `-Prefix`.

    A prefix counts only if a trusted proxy sends it, once, and it is valid. The client's address is
    found by `ForwardedFor`. Request targets in absolute form, which clients send to proxies, become
    paths (RFC 9112, 3.2.2).
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
                scope = self._with_address(_with_prefix(scope))
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
