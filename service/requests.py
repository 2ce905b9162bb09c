"""Middleware around every request: request id, trace, access log, metrics, limits, path, HEAD."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics, prefix, problems
from worker.telemetry import logs, tracing

log = logging.getLogger("afterimage.access")

QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
"""Routes that probes and Prometheus poll: logged at DEBUG unless they fail."""
SEND_S = 60.0
"""How long a client may take to read one chunk. A client that stops reading would otherwise keep
its response and upload in memory."""
CHUNK = 2**18
"""Largest part of a response that is sent at a time, in bytes."""
MAX_HEADER_BYTES = 2**16
"""Request line and headers together; they are read before the caller is authenticated."""
MAX_HEADER_LINES = 256
"""Lines of a request's head, or of the trailers of a body: each costs about 5 µs."""
HEADERS_TOO_LARGE = (
    f"the request line and headers exceed {MAX_HEADER_BYTES} bytes or {MAX_HEADER_LINES} lines; "
    "shorten them"
)
"""Detail of the problem `headers-too-large`."""
CLIENT_GONE = 499
"""The status in logs and metrics if the client disconnected before the response began."""
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class RequestLog:
    """What is recorded about a request when it ends."""

    request_id: str
    method: str
    traceparent: str = ""
    status: int = 0  # 0 until the response begins
    sent: int = 0  # bytes of the response's body
    began: float = field(default_factory=time.perf_counter)  # seconds


class RequestMiddleware:
    """ASGI middleware that passes request and response bodies on without buffering them.

    `root_path` is the path prefix of requests that have no `X-Forwarded-Prefix`.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self.app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        entry = RequestLog(_request_id(headers), scope["method"])
        scope.setdefault("state", {})["request_id"] = entry.request_id
        token = logs.request_id.set(entry.request_id)
        scope = _routed(scope, self._root_path)
        prefix.current.set(scope.get("root_path", ""))
        app = self.app if _header_bytes(scope) <= MAX_HEADER_BYTES else _refuse_headers
        with tracing.extract(_trace_headers(headers)), tracing.span(entry.method, kind="server"):
            entry.traceparent = tracing.inject().get("traceparent", "")
            try:
                await _respond(app, scope, receive, _observed(scope, send, entry), entry.method)
            except ClientDisconnect:
                pass  # nobody is left to respond to
            except Exception:
                entry.status = 500
                raise  # `request_id` is not reset, so that the server's traceback is logged with it
            finally:
                record_request(scope, entry)
        logs.request_id.reset(token)


def _routed(scope: Scope, root_path: str) -> Scope:
    """Return the request as it is routed: with its prefix, without a slash at its end, HEAD as GET.

    The proxy may or may not have removed the prefix `root_path`. `Range` of HEAD is ignored, as
    RFC 9110 says. `&amp;` between parameters, in a link that was copied from HTML, is `&`.
    """
    if b"&amp;" in scope["query_string"]:
        scope = {**scope, "query_string": scope["query_string"].replace(b"&amp;", b"&")}
    if root_path and not scope.get("root_path"):
        kept = scope["path"].startswith(f"{root_path}/")
        scope = {**scope, "root_path": root_path} if kept else prefix.prepend(scope, root_path)
    root, path = scope.get("root_path", ""), scope["path"]
    if path.endswith("/") and path != f"{root}/":
        scope = {**scope, "path": path[:-1]}
    if scope["method"] == "HEAD":
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        scope = {**scope, "method": "GET", "headers": headers}
    return scope


def _header_bytes(scope: Scope) -> int:
    """The size of the request line and headers, without what separates them."""
    line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return line + sum(len(name) + len(value) for name, value in scope["headers"])


async def _refuse_headers(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application that answers 431."""
    kind = problems.HeadersTooLarge
    await problems.problem(problems.status_of(kind), kind.kind, HEADERS_TOO_LARGE)(
        scope, receive, send
    )


async def _respond(app: ASGIApp, scope: Scope, receive: Receive, send: Send, method: str) -> None:
    """Let `app` respond; the response to HEAD ends after its headers."""
    if method != "HEAD":
        await app(scope, receive, _in_chunks(send))
        return
    with anyio.CancelScope() as running:
        await app(scope, receive, _headers_only(send, running.cancel))


def _headers_only(send: Send, cancel: Callable[[], None]) -> Send:
    """Wrap `send`: leave out the body. A stream, which may be long, is stopped by `cancel`."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if "content-length" not in Headers(raw=message.get("headers", [])):
                cancel()

    return send_headers


def _request_id(headers: Headers) -> str:
    """The id that the client sent in `X-Request-Id`, or a new one if that is missing or invalid."""
    sent = headers.get("x-request-id", "")
    return sent if _VALID_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def _trace_headers(headers: Headers) -> dict[str, str]:
    return {name: headers.get(name, "") for name in ("traceparent", "tracestate")}


def _in_chunks(send: Send) -> Send:
    """Wrap `send`: bodies go out in chunks.

    Raises `ClientDisconnect` if the client does not read a chunk within `SEND_S`.
    """

    async def send_chunks(message: Message) -> None:
        body = message.get("body", b"")
        for at in range(0, len(body) or 1, CHUNK):
            part = message
            if len(body) > CHUNK:
                more = message.get("more_body", False) or at + CHUNK < len(body)
                part = {**message, "body": body[at : at + CHUNK], "more_body": more}
            try:
                with anyio.fail_after(SEND_S):
                    await send(part)
            except TimeoutError:
                raise ClientDisconnect from None

    return send_chunks


def _observed(scope: Scope, send: Send, entry: RequestLog) -> Send:
    """Wrap `send`: add ids and rate-limit headers to the response; count its bytes in `entry`."""

    async def send_and_count(message: Message) -> None:
        if message["type"] == "http.response.start":
            entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = entry.request_id
            headers["X-Content-Type-Options"] = "nosniff"
            if entry.traceparent:
                headers["traceparent"] = entry.traceparent
            for name, value in scope["state"].get("quota", {}).items():
                headers.setdefault(name, value)  # a 429 response has set them already
        elif message["type"] == "http.response.body":
            entry.sent += len(message.get("body", b""))
        await send(message)

    return send_and_count


def route(scope: Scope) -> str:
    """The path template of a request, such as `/v1/decodes/{id}`.

    `other` for endpoints without a template (static files), `unmatched` if no route matched.
    """
    template = getattr(scope.get("route"), "path_format", None)
    return template or ("other" if "endpoint" in scope else "unmatched")


def record_request(scope: Scope, entry: RequestLog) -> None:
    """Write metrics, span attributes and a log line for a request that has ended."""
    seconds = time.perf_counter() - entry.began
    status, template, method = entry.status or CLIENT_GONE, route(scope), entry.method
    waited_s = scope.get("state", {}).get("waited_s", 0.0)  # waiting that the client asked for
    metrics.request(template, method, status, seconds - waited_s)
    attributes: dict[str, str | int] = {
        "http.request.method": method, "http.route": template,
        "http.response.status_code": status, "afterimage.request_id": entry.request_id,
    }  # fmt: skip
    tracing.annotate(f"{method} {template}", error=status >= 500, **attributes)
    fields = {
        "method": method, "route": template, "status": status, "ms": round(seconds * 1e3, 1),
        "bytes": entry.sent, "request_id": entry.request_id, **_caller_and_job(scope),
    }  # fmt: skip
    if entry.traceparent:
        fields["trace_id"] = entry.traceparent.split("-")[1]
    quiet = template in QUIET and status < 500
    level = logging.DEBUG if quiet else logging.ERROR if status == 500 else logging.INFO
    text = "%s %s %d in %.1f ms, %d bytes"
    log.log(level, text, method, template, status, seconds * 1e3, entry.sent, extra=fields)


def _caller_and_job(scope: Scope) -> dict[str, str]:
    """Caller and job id, if known: from the request's state, which routes set, or from its path."""
    state = scope.get("state", {})
    path_id = str(scope.get("path_params", {}).get("id", ""))
    job_id = state.get("job_id") or (path_id if _JOB_ID.fullmatch(path_id) else "")
    fields = {"caller": state.get("caller"), "job_id": job_id}
    return {name: str(value) for name, value in fields.items() if value}
