"""Traces by OpenTelemetry: exported if OTEL_… variables ask for it, otherwise only passed on.

The API package `opentelemetry-api` carries the trace context from request to job in any case. The
SDK and its exporter are imported only if they are configured.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("afterimage.tracing")

Value = str | int | float | bool
_CONFIGURED = (
    "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"
)  # fmt: skip
_PROPAGATOR = TraceContextTextMapPropagator()

_tracer: trace.Tracer = trace.NoOpTracer()
_provider: "TracerProvider | None" = None


def setup(service_name: str) -> None:
    """Export spans as the OTEL_… variables configure it; no effect if they do not.

    OTEL_SERVICE_NAME overrides `service_name`.
    """
    global _tracer, _provider
    if _provider is not None or not configured():
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(os.environ.get("OTEL_TRACES_EXPORTER") or "otlp")
    except (ImportError, ValueError) as e:
        reason = f"install afterimage[otel] ({e})" if isinstance(e, ImportError) else e
        log.error("tracing is configured, but off: %s", reason)
        return
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service_name}
    _provider = TracerProvider(resource=Resource.create(name))
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("afterimage")


def configured() -> bool:
    """True if the environment asks for traces."""
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
    """Export the remaining spans and stop tracing; happens at the end of the process anyway."""
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer, _provider = trace.NoOpTracer(), None


@contextmanager
def span(
    name: str, kind: Literal["internal", "server", "consumer"] = "internal", **attributes: Value
) -> Iterator[None]:
    """A span in the current trace; records an exception raised in the block."""
    span_kind = trace.SpanKind[kind.upper()]
    with _tracer.start_as_current_span(name, kind=span_kind, attributes=attributes):
        yield


def annotate(name: str = "", error: bool = False, **attributes: Value) -> None:
    """Add attributes to the current span; rename it, or mark it as failed."""
    current = trace.get_current_span()
    current.set_attributes(attributes)
    if name:
        current.update_name(name)
    if error:
        current.set_status(trace.StatusCode.ERROR)


def inject() -> dict[str, str]:
    """The current trace context: `traceparent`, and `tracestate` if any; empty outside a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier


@contextmanager
def extract(carrier: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace of `carrier` within the block; start anew if it holds no valid one."""
    headers = {name: value for name, value in carrier.items() if value.isprintable()}
    token = context.attach(_PROPAGATOR.extract(headers, context.Context()))
    try:
        yield
    finally:
        context.detach(token)
