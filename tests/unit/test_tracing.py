"""Traces: exported by the real exporter to a local receiver, and passed from request to job."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest as Export,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from worker.telemetry import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Receiver(ThreadingHTTPServer):
    """An OTLP collector that keeps the spans it receives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[tuple[str, Span]] = []  # service, span

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str) -> tuple[str, Span]:
        return next(found for found in self.spans if found[1].name == name)


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        export = Export.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in export.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.server.spans += [(names["service.name"], span) for span in spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield
    tracing.shutdown()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A running receiver that the environment names."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip


def test_a_span_is_exported_in_the_trace_of_the_request(receiver: Receiver) -> None:
    tracing.setup("afterimage-api")
    with tracing.extract({"traceparent": TRACEPARENT}), tracing.span("GET", "server", size=3):
        tracing.annotate("GET /x", error=True, status=500)
    tracing.shutdown()
    service, span = receiver.named("GET /x")
    assert service == "afterimage-api"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == Span.SPAN_KIND_SERVER and span.status.code == span.status.STATUS_CODE_ERROR
    assert {a.key: a.value.int_value for a in span.attributes} == {"size": 3, "status": 500}


def test_a_job_in_a_worker_continues_the_requests_trace(receiver: Receiver) -> None:
    tracing.setup("afterimage-api")
    with tracing.extract({"traceparent": TRACEPARENT}), tracing.span("request"):
        carried = tracing.inject()
    tracing.shutdown()
    _run(
        "import json, os\nfrom worker.telemetry import tracing\n"
        "tracing.setup('afterimage-worker')\n"
        "carried = json.loads(os.environ['CARRIED'])\n"
        "with tracing.extract(carried), tracing.span('job', 'consumer'), tracing.span('sample'):\n"
        "    pass\n",  # and the process's end sends them
        CARRIED=json.dumps(carried),
    )
    request, job, inner = (receiver.named(n) for n in ("request", "job", "sample"))
    assert {s.trace_id.hex() for _, s in (request, job, inner)} == {TRACE}
    assert job[1].parent_span_id == request[1].span_id
    assert inner[1].parent_span_id == job[1].span_id
    assert (request[0], job[0]) == ("afterimage-api", "afterimage-worker")


def test_an_exception_in_a_span_is_recorded(receiver: Receiver) -> None:
    tracing.setup("afterimage-api")
    with contextlib.suppress(ValueError), tracing.span("fails"):
        raise ValueError("odd")
    tracing.shutdown()
    _, span = receiver.named("fails")
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert [event.name for event in span.events] == ["exception"]


def test_otel_service_name_overrides_the_given_name(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    tracing.setup("afterimage-api")
    with tracing.span("one"):
        pass
    tracing.shutdown()
    assert receiver.named("one")[0] == "pictures"


def test_a_malformed_context_starts_a_new_trace(receiver: Receiver) -> None:
    tracing.setup("afterimage-api")
    with tracing.extract({"traceparent": "00-nonsense"}), tracing.span("root"):
        assert tracing.inject()["traceparent"].split("-")[1] != TRACE
    tracing.shutdown()
    assert receiver.named("root")[1].parent_span_id == b""


def test_an_unreachable_collector_raises_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.setup("afterimage-api")
    with tracing.span("lost"):
        pass
    tracing.shutdown()


def test_unconfigured_neither_sdk_nor_exporter_is_imported() -> None:
    done = _run(
        "import sys\nfrom worker.telemetry import tracing\ntracing.setup('x')\n"
        "with tracing.extract({}), tracing.span('a', size=1): tracing.annotate('b', size=2)\n"
        "sdk = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print(tracing.inject(), [m for m in sys.modules if m.startswith(sdk)])"
    )
    assert done.stdout == "{} []\n" and done.stderr == ""


@pytest.mark.parametrize("off", [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
def test_variables_that_disable_tracing_win(
    monkeypatch: pytest.MonkeyPatch, off: dict[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    assert not tracing.configured()


def test_a_missing_sdk_is_reported_in_one_line() -> None:
    done = _run(
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from worker.telemetry import logs, tracing\n"
        "logs.setup('INFO', json=False)\ntracing.setup('x')\n"
        "with tracing.span('a'): pass",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.stderr.count("\n") == 1
    assert "tracing is configured, but off: install afterimage[otel]" in done.stderr


def test_an_unknown_exporter_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with caplog.at_level(logging.ERROR):
        tracing.setup("x")
    assert caplog.messages == [
        "tracing is configured, but off: OTEL_TRACES_EXPORTER is 'zipkin'; "
        "it may be otlp, console or none"
    ]


def test_the_console_exporter_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    done = _run(
        "from worker.telemetry import tracing\ntracing.setup('x')\nwith tracing.span('seen'): pass"
    )
    assert '"name": "seen"' in done.stdout


@pytest.mark.parametrize(
    ("traceparent", "passed"),
    [
        (TRACEPARENT, TRACEPARENT),
        (f"01-{TRACE}-{PARENT}-01-later", TRACEPARENT),
        (f"00-{TRACE}-{PARENT}-01-later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}-01\n", None),
        ("", None),
    ],
)
def test_unconfigured_a_valid_context_is_passed_on(traceparent: str, passed: str | None) -> None:
    with tracing.extract({"traceparent": traceparent}):
        assert tracing.inject() == ({"traceparent": passed} if passed else {})
    assert tracing.inject() == {}
