"""OpenTelemetry, if it is configured and installed; else a trace's context is only passed on."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

log = logging.getLogger("afterimage.tracing")

Value = str | int | float | bool
_CONFIGURED = (
    "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"
)  # fmt: skip
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?"
)
"""W3C Trace Context; only versions after 00 may have more fields."""

_tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None
_passed: ContextVar[str] = ContextVar("traceparent", default="")
"""The traceparent that came, while tracing is off."""


def setup(service_name: str) -> None:
    """Export spans as the variables OTEL_… say; nothing, and no import, where they say nothing.

    OTEL_SERVICE_NAME, where set, wins over `service_name`.
    """
    global _tracer, _provider
    if _tracer is not None or not configured():
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(os.environ.get("OTEL_TRACES_EXPORTER") or "otlp")
    except (ImportError, ValueError) as e:
        why = f"install afterimage[otel] ({e})" if isinstance(e, ImportError) else e
        log.error("tracing is configured, but off: %s", why)
        return
    own = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service_name}
    _provider = TracerProvider(resource=Resource.create(own))
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("afterimage")


def configured() -> bool:
    """Whether the environment asks for traces."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(os.environ.get(name) for name in _CONFIGURED)


def _exporter(name: str) -> "SpanExporter":
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {name!r}; it may be otlp, console or none")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def shutdown() -> None:
    """Send what is left, and be off; at the end of a process this happens by itself."""
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


@contextmanager
def span(
    name: str, kind: Literal["internal", "server", "consumer"] = "internal", **attributes: Value
) -> Iterator[None]:
    """A span of the current trace; what is raised within is recorded in it."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(name, kind=SpanKind[kind.upper()], attributes=attributes):
        yield


def annotate(name: str = "", error: bool = False, **attributes: Value) -> None:
    """What became known of the current span."""
    if _tracer is None:
        return
    from opentelemetry.trace import StatusCode, get_current_span

    current = get_current_span()
    current.set_attributes(attributes)
    if name:
        current.update_name(name)
    if error:
        current.set_status(StatusCode.ERROR)


def inject() -> dict[str, str]:
    """The current trace's context, `traceparent` (and `tracestate`); empty outside of a trace."""
    if _tracer is None:
        return {"traceparent": _passed.get()} if _passed.get() else {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


@contextmanager
def extract(carrier: Mapping[str, str]) -> Iterator[None]:
    """Within, the trace that `inject` wrote to the carrier goes on; a malformed one is ignored."""
    known = _checked(carrier)
    if _tracer is None:
        token = _passed.set(known.get("traceparent", ""))
        try:
            yield
        finally:
            _passed.reset(token)
        return
    from opentelemetry import context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attached = context.attach(TraceContextTextMapPropagator().extract(known, context.Context()))
    try:
        yield
    finally:
        context.detach(attached)


def _checked(carrier: Mapping[str, str]) -> dict[str, str]:
    """What the carrier says, as version 00; nothing where it is malformed."""
    found = _TRACEPARENT.fullmatch(carrier.get("traceparent", ""))
    if not found or (found[1] == "00" and found[3]):
        return {}
    return {"traceparent": f"00-{found[2]}", "tracestate": carrier.get("tracestate", "")}
