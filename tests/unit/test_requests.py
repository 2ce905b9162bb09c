"""The request middleware, in process and, for streaming, in a real server."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import PlainTextResponse

from service import metrics, prefix, requests
from service.requests import RequestMiddleware
from worker.telemetry import logs, tracing

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
JOB = "3f" * 16

release = threading.Event()
router = APIRouter(prefix="/v1/decodes")


@router.get("/{id}")
async def read(id: str) -> str:
    return id


@router.post("")
async def make(request: Request) -> dict[str, str]:
    request.state.caller, request.state.job_id = "gallery", JOB
    seen = await anyio.to_thread.run_sync(logs.request_id.get)
    return {"seen": seen, **tracing.inject()}


@router.put("/{id}")
async def fail(id: str) -> None:
    raise RuntimeError("boom")


@router.get("/{id}/events")
async def follow(id: str) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        yield "data: first\n\n"
        await asyncio.to_thread(release.wait, 10)
        yield "data: second\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def app(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    for name in [n for n in os.environ if n.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    app = FastAPI()
    app.include_router(router)
    app.add_api_route("/livez", lambda: "ok")
    app.mount("/static", StaticFiles(directory=str(tmp_path)))
    app.add_middleware(RequestMiddleware)

    @app.exception_handler(Exception)
    async def _answer(request: Request, _e: Exception) -> PlainTextResponse:
        return PlainTextResponse(request.state.request_id, 500)

    return app


def send_request(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    """Send one request; write _ for - in names of headers."""
    dashed = {name.replace("_", "-"): value for name, value in headers.items()}

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=dashed)

    return asyncio.run(once())


Log = pytest.LogCaptureFixture


@pytest.fixture
def lines(caplog: Log) -> Iterator[Log]:
    """Captures the access log."""
    with caplog.at_level(logging.DEBUG, "afterimage.access"):
        yield caplog


def access(lines: Log) -> dict[str, object]:
    """The fields of the only line of the access log."""
    (line,) = [x for x in lines.records if x.name == "afterimage.access"]
    return vars(line)


def test_a_valid_request_id_is_echoed_and_set_within_the_request(app: FastAPI) -> None:
    response = send_request(app, "POST", "/v1/decodes", x_request_id="client-1._A")
    assert response.headers["x-request-id"] == "client-1._A"
    assert response.json()["seen"] == "client-1._A"
    assert logs.request_id.get() == ""


@pytest.mark.parametrize("invalid", ["", "a b", "x" * 65, "a;b", "a/b"])
def test_an_invalid_request_id_is_replaced(app: FastAPI, invalid: str) -> None:
    first = send_request(app, "GET", "/v1/decodes/1", x_request_id=invalid).headers["x-request-id"]
    second = send_request(app, "GET", "/v1/decodes/1").headers["x-request-id"]
    assert len(first) == len(second) == 32 and int(first, 16) != int(second, 16)


def test_time_waited_on_request_is_not_counted_as_latency(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[tuple[object, ...]] = []
    monkeypatch.setattr(metrics, "request", lambda *labels: observed.append(labels))

    @app.post("/v1/waits")
    async def wait(request: Request) -> None:
        await asyncio.sleep(0.3)
        request.state.waited_s = 0.3

    send_request(app, "POST", "/v1/waits")
    ((*labels, seconds),) = observed
    assert labels == ["/v1/waits", "POST", 200]
    assert isinstance(seconds, float) and seconds < 0.25


@pytest.mark.parametrize("path", [f"/v1/decodes/{JOB}", "/v1/decodes/1", "/livez", "/none"])
def test_head_is_get_without_the_body(app: FastAPI, lines: Log, path: str) -> None:
    head = send_request(app, "HEAD", path, x_request_id="same")
    assert access(lines)["method"] == "HEAD"
    get = send_request(app, "GET", path, x_request_id="same")
    assert (head.status_code, head.headers) == (get.status_code, get.headers)
    assert head.content == b""


def test_head_of_a_stream_ends_after_the_headers(app: FastAPI, lines: Log) -> None:
    ended = []

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            try:
                yield "data: first\n\n"
                await anyio.sleep_forever()
            finally:
                ended.append(True)

        return StreamingResponse(events(), media_type="text/event-stream")

    response = send_request(app, "HEAD", "/endless")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.status_code, response.content, ended) == (200, b"", [True])
    fields = access(lines)
    assert (fields["method"], fields["route"], fields["status"]) == ("HEAD", "/endless", 200)


def test_a_range_is_ignored_with_head(app: FastAPI, tmp_path: Path) -> None:
    (tmp_path / "ten").write_bytes(bytes(10))
    for method, status, length in (("GET", 206, "2"), ("HEAD", 200, "10")):
        response = send_request(app, method, "/static/ten", range="bytes=0-1")
        assert (response.status_code, response.headers["content-length"]) == (status, length)


def test_one_slash_at_the_end_of_a_path_does_not_matter(app: FastAPI) -> None:
    assert send_request(app, "GET", f"/v1/decodes/{JOB}/").json() == JOB
    assert send_request(app, "POST", "/v1/decodes/").status_code == 200
    assert send_request(app, "POST", "/v1//decodes").status_code == 404


def test_too_large_headers_are_refused(app: FastAPI) -> None:
    response = send_request(app, "GET", "/livez", x=requests.MAX_HEADER_BYTES * "a")
    assert (response.status_code, response.json()["status"]) == (431, 431)
    assert response.json()["type"] == "urn:afterimage:problem:headers-too-large"
    long = f"/livez?{60_000 * 'a'}"
    assert send_request(app, "GET", long).status_code == 200
    assert send_request(app, "GET", long, x=6000 * "a").status_code == 431
    assert send_request(app, "GET", "/livez", x=60_000 * "a").status_code == 200


def prefixed(root_path: str, own: str, path: str) -> dict[str, str]:
    """What a route sees of a request, with the configured prefix `root_path` and its `own`."""
    app = FastAPI()
    app.add_middleware(RequestMiddleware, root_path=root_path)

    @app.get("/v1/seen")
    async def seen(request: Request) -> dict[str, str]:
        return {"routed": prefix.routed(request.scope["path"]), "public": prefix.public("/v1/x")}

    async def once() -> dict[str, str]:
        transport = httpx.ASGITransport(app, root_path=own)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer: dict[str, str] = (await client.get(path)).json()
            return answer

    return asyncio.run(once())


@pytest.mark.parametrize("path", ["/v1/seen", "/after/v1/seen", "/v1/seen/", "/after/v1/seen/"])
def test_a_configured_prefix_may_have_been_removed_or_not(path: str) -> None:
    assert prefixed("/after", "", path) == {"routed": "/v1/seen", "public": "/after/v1/x"}


def test_the_prefix_of_the_request_overrides_the_configured_one() -> None:
    found = prefixed("/after", "/before", "/before/v1/seen")
    assert found == {"routed": "/v1/seen", "public": "/before/v1/x"}
    assert prefixed("", "", "/v1/seen")["public"] == "/v1/x"


def test_error_responses_have_a_request_id(app: FastAPI) -> None:
    assert send_request(app, "GET", "/nothing", x_request_id="e-1").headers["x-request-id"] == "e-1"
    assert (
        send_request(app, "PATCH", "/v1/decodes", x_request_id="e-2").headers["x-request-id"]
        == "e-2"
    )
    assert (
        send_request(app, "PUT", "/v1/decodes/1", x_request_id="e-3").text == "e-3"
    )  # from request.state


def test_the_access_log_has_route_status_time_bytes_ids_and_caller(
    app: FastAPI, lines: Log
) -> None:
    response = send_request(app, "POST", "/v1/decodes?signature=S3cr3t", x_request_id="r-1")
    fields = access(lines)
    expected = {
        "method": "POST", "route": "/v1/decodes", "status": 200, "bytes": len(response.content),
        "request_id": "r-1", "caller": "gallery", "job_id": JOB, "levelname": "INFO",
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert isinstance(fields["ms"], float) and 0 < fields["ms"] < 10_000
    assert "S3cr3t" not in str(fields)


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "level"),
    [
        ("GET", f"/v1/decodes/{JOB}", "/v1/decodes/{id}", 200, "INFO"),
        ("PATCH", "/v1/decodes/1", "/v1/decodes/{id}", 405, "INFO"),
        ("PUT", "/v1/decodes/1", "/v1/decodes/{id}", 500, "ERROR"),
        ("GET", "/no/such/path", "unmatched", 404, "INFO"),
        ("GET", "/static/none", "other", 404, "INFO"),
        ("GET", "/livez", "/livez", 200, "DEBUG"),
    ],
)
def test_the_access_log_has_the_route_template(
    app: FastAPI, lines: Log,
    method: str, path: str, route: str, status: int, level: str,
) -> None:  # fmt: skip
    send_request(app, method, path)
    fields = access(lines)
    assert (fields["route"], fields["status"], fields["levelname"]) == (route, status, level)


@pytest.mark.parametrize(("id", "job"), [(JOB, JOB), ("what%0Aever", None)])
def test_a_job_id_in_the_path_is_logged(app: FastAPI, lines: Log, id: str, job: str | None) -> None:
    send_request(app, "GET", f"/v1/decodes/{id}")
    assert access(lines).get("job_id") == job


def test_an_incoming_trace_is_propagated_and_logged(app: FastAPI, lines: Log) -> None:
    response = send_request(app, "POST", "/v1/decodes", traceparent=TRACEPARENT)
    assert response.json()["traceparent"] == response.headers["traceparent"] == TRACEPARENT
    assert access(lines)["trace_id"] == TRACEPARENT.split("-")[1]


def test_a_malformed_trace_is_ignored(app: FastAPI) -> None:
    response = send_request(app, "POST", "/v1/decodes", traceparent="00-zz-zz-01")
    assert "traceparent" not in response.json() and "traceparent" not in response.headers


def test_with_opentelemetry_the_response_names_the_span_of_the_server(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.setup("test")
    try:
        response = send_request(app, "POST", "/v1/decodes", traceparent=TRACEPARENT)
    finally:
        tracing.shutdown()
    span = response.headers["traceparent"]
    assert span == response.json()["traceparent"]
    assert span.split("-")[1] == TRACEPARENT.split("-")[1] and span != TRACEPARENT


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Run `app` in a real server; yield its URL."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_events_are_streamed_without_buffering(app: FastAPI, lines: Log) -> None:
    release.clear()
    with (
        served(app) as url,
        httpx.stream("GET", f"{url}/v1/decodes/{JOB}/events", trust_env=False) as response,
    ):
        assert response.headers["x-request-id"]
        parts = response.iter_text()
        assert next(parts) == "data: first\n\n"
        assert not [
            x for x in lines.records if x.name == "afterimage.access"
        ]  # not before the stream ends
        release.set()
        assert next(parts) == "data: second\n\n"
    assert access(lines)["bytes"] == len("data: first\n\ndata: second\n\n")


def test_a_client_that_does_not_read_is_dropped_after_the_send_timeout(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, lines: Log
) -> None:
    monkeypatch.setattr(requests, "SEND_S", 0.3)
    released = threading.Event()

    async def resource() -> AsyncIterator[None]:
        try:
            yield
        finally:
            released.set()

    @app.get("/large", dependencies=[Depends(resource)])
    async def large() -> Response:
        return Response(bytes(2**26))

    with served(app) as url, socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert released.wait(20)
        released.clear()
        assert httpx.get(f"{url}/large", trust_env=False).content == bytes(2**26)
        assert released.wait(20)
    unread, read = (x.__dict__["bytes"] for x in lines.records if x.name == "afterimage.access")
    assert unread < read == 2**26


def test_the_traceback_of_the_server_has_the_request_id(app: FastAPI, caplog: Log) -> None:
    seen: list[str] = []

    def save_request_id(_record: logging.LogRecord) -> bool:
        seen.append(logs.request_id.get())
        return True

    caplog.handler.addFilter(save_request_id)
    with served(app) as url, caplog.at_level(logging.ERROR, "uvicorn.error"):
        httpx.put(f"{url}/v1/decodes/1", headers={"X-Request-Id": "t-1"}, trust_env=False)
    (error,) = [x for x in caplog.records if x.name == "uvicorn.error" and x.exc_info]
    assert seen[caplog.records.index(error)] == "t-1"
    caplog.handler.removeFilter(save_request_id)
