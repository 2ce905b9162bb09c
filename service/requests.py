"""ASGI middleware for all requests: request id, trace, access log, metrics, send timeout."""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from worker.telemetry import logs, tracing

log = logging.getLogger("afterimage.access")

QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
"""Routes that probes and Prometheus poll: logged at DEBUG unless they fail."""
SEND_S = 60.0
"""How long a client may take to read one chunk. A client that stops reading would otherwise keep
its response and upload in memory."""
CHUNK = 2**18
"""Largest part of a response that is sent at a time, in bytes."""
CLIENT_GONE = 499
"""The status in logs and metrics if the client disconnected before the response began."""
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class RequestLog:
    """What is recorded about a request when it ends."""

    request_id: str
    traceparent: str = ""
    status: int = 0  # 0 until the response begins
    sent: int = 0  # bytes of the response's body
    began: float = field(default_factory=time.perf_counter)  # seconds


class RequestMiddleware:
    """ASGI middleware that passes request and response bodies on without buffering them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        entry = RequestLog(_request_id(headers))
        scope.setdefault("state", {})["request_id"] = entry.request_id
        token = logs.request_id.set(entry.request_id)
        with tracing.extract(_trace_headers(headers)), tracing.span(scope["method"], kind="server"):
            entry.traceparent = tracing.inject().get("traceparent", "")
            try:
                await self.app(scope, receive, _in_chunks(_observed(scope, send, entry)))
            except ClientDisconnect:
                pass  # nobody is left to respond to
            except Exception:
                entry.status = 500
                raise  # `request_id` is not reset, so that the server's traceback is logged with it
            finally:
                record_request(scope, entry)
        logs.request_id.reset(token)


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
    status, template, method = entry.status or CLIENT_GONE, route(scope), scope["method"]
    waited_s = scope.get("state", {}).get("waited_s", 0.0)  # because of `Prefer: wait`
    metrics.request(template, method, status, seconds - waited_s)
    tracing.annotate(
        f"{method} {template}",
        error=status >= 500,
        **{"http.request.method": method, "http.route": template,
           "http.response.status_code": status, "afterimage.request_id": entry.request_id},
    )  # fmt: skip
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
