"""Around every request: its id, its trace, one line in the log, its share of the metrics."""

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
"""Routes that machines ask every few seconds: logged at DEBUG unless they fail."""
SEND_S = 60.0
"""How long a part of an answer may wait for the client to read: who never does would hold it, and
what the request brought, in memory."""
PART = 2**18
"""Bytes of it."""
GONE = 499
"""The status that is logged where the client left before an answer."""
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Seen:
    """What is known of a request's answer while it is sent."""

    request_id: str
    traceparent: str = ""
    status: int = 0  # 0: no answer began
    sent: int = 0  # bytes of the body
    began: float = field(default_factory=time.perf_counter)  # seconds


class Requests:
    """ASGI middleware; bodies and events pass through as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        seen = Seen(_request_id(headers))
        scope.setdefault("state", {})["request_id"] = seen.request_id
        token = logs.request_id.set(seen.request_id)
        with tracing.extract(_trace(headers)), tracing.span(scope["method"], kind="server"):
            seen.traceparent = tracing.inject().get("traceparent", "")
            try:
                await self.app(scope, receive, _in_parts(_telling(scope, send, seen)))
            except ClientDisconnect:
                pass  # nobody to answer
            except Exception:
                seen.status = 500
                raise  # the id stays set for the server, which logs the traceback
            finally:
                _tell(scope, seen)
        logs.request_id.reset(token)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex


def _trace(headers: Headers) -> dict[str, str]:
    return {name: headers.get(name, "") for name in ("traceparent", "tracestate")}


def _in_parts(send: Send) -> Send:
    """`send`, which raises `ClientDisconnect` when nobody reads for `SEND_S`."""

    async def sent(message: Message) -> None:
        body = message.get("body", b"")
        for at in range(0, len(body) or 1, PART):
            part = message
            if len(body) > PART:
                more = message.get("more_body", False) or at + PART < len(body)
                part = {**message, "body": body[at : at + PART], "more_body": more}
            try:
                with anyio.fail_after(SEND_S):
                    await send(part)
            except TimeoutError:
                raise ClientDisconnect from None

    return sent


def _telling(scope: Scope, send: Send, seen: Seen) -> Send:
    """`send`, which adds ids and what is left of the quota to the answer, and counts it."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = seen.request_id
            headers["X-Content-Type-Options"] = "nosniff"
            if seen.traceparent:
                headers["traceparent"] = seen.traceparent
            for name, value in scope["state"].get("quota", {}).items():
                headers.setdefault(name, value)  # a refusal tells of the quota that it is for
        elif message["type"] == "http.response.body":
            seen.sent += len(message.get("body", b""))
        await send(message)

    return told


def route(scope: Scope) -> str:
    """The template of the matched path, as `/v1/decodes/{id}`; `other` for what has none (static
    files), `unmatched` for what no route knows."""
    template = getattr(scope.get("route"), "path_format", None)
    return template or ("other" if "endpoint" in scope else "unmatched")


def _tell(scope: Scope, seen: Seen) -> None:
    """Metrics, span and log line of a request that has ended."""
    seconds = time.perf_counter() - seen.began
    status, template, method = seen.status or GONE, route(scope), scope["method"]
    waited_s = scope.get("state", {}).get("waited_s", 0.0)  # as the client wanted
    metrics.request(template, method, status, seconds - waited_s)
    tracing.annotate(
        f"{method} {template}",
        error=status >= 500,
        **{"http.request.method": method, "http.route": template,
           "http.response.status_code": status, "afterimage.request_id": seen.request_id},
    )  # fmt: skip
    fields = {
        "method": method, "route": template, "status": status, "ms": round(seconds * 1e3, 1),
        "bytes": seen.sent, "request_id": seen.request_id, **_ours(scope),
    }  # fmt: skip
    if seen.traceparent:
        fields["trace_id"] = seen.traceparent.split("-")[1]
    quiet = template in QUIET and status < 500
    level = logging.DEBUG if quiet else logging.ERROR if status == 500 else logging.INFO
    text = "%s %s %d in %.1f ms, %d bytes"
    log.log(level, text, method, template, status, seconds * 1e3, seen.sent, extra=fields)


def _ours(scope: Scope) -> dict[str, str]:
    """Caller and job, as the routes said in the request's state, or as the path names the job."""
    state = scope.get("state", {})
    named = str(scope.get("path_params", {}).get("id", ""))
    job = state.get("job_id") or (named if _JOB_ID.fullmatch(named) else "")
    fields = {"caller": state.get("caller"), "job_id": job}
    return {name: str(value) for name, value in fields.items() if value}
