"""The middleware around every request, over httpx and, where bytes must flow, a real server."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio.to_thread
import httpx
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import PlainTextResponse

from service import metrics, requests
from service.requests import Requests
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
    made = FastAPI()
    made.include_router(router)
    made.add_api_route("/livez", lambda: "ok")
    made.mount("/static", StaticFiles(directory=str(tmp_path)))
    made.add_middleware(Requests)

    @made.exception_handler(Exception)
    async def _answer(request: Request, _e: Exception) -> PlainTextResponse:
        return PlainTextResponse(request.state.request_id, 500)

    return made


def ask(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    """One request; names of headers with _ for -."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=sent)

    return asyncio.run(once())


Log = pytest.LogCaptureFixture


@pytest.fixture
def lines(caplog: Log) -> Iterator[Log]:
    """The access log is kept."""
    with caplog.at_level(logging.DEBUG, "afterimage.access"):
        yield caplog


def access(lines: Log) -> dict[str, object]:
    """The only line's fields."""
    (line,) = [x for x in lines.records if x.name == "afterimage.access"]
    return vars(line)


def test_a_given_id_is_answered_and_known_within_the_request(app: FastAPI) -> None:
    answer = ask(app, "POST", "/v1/decodes", x_request_id="client-1._A")
    assert answer.headers["x-request-id"] == "client-1._A"
    assert answer.json()["seen"] == "client-1._A"
    assert logs.request_id.get() == ""


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a;b", "a/b"])
def test_another_id_is_replaced(app: FastAPI, given: str) -> None:
    first = ask(app, "GET", "/v1/decodes/1", x_request_id=given).headers["x-request-id"]
    second = ask(app, "GET", "/v1/decodes/1").headers["x-request-id"]
    assert len(first) == len(second) == 32 and int(first, 16) != int(second, 16)


def test_what_a_client_wanted_to_wait_is_no_slowness_of_ours(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[object, ...]] = []
    monkeypatch.setattr(metrics, "request", lambda *of: counted.append(of))

    @app.post("/v1/waits")
    async def wait(request: Request) -> None:
        await asyncio.sleep(0.3)
        request.state.waited_s = 0.3

    ask(app, "POST", "/v1/waits")
    ((*named, seconds),) = counted
    assert named == ["/v1/waits", "POST", 200]
    assert isinstance(seconds, float) and seconds < 0.25


def test_errors_have_an_id_too(app: FastAPI) -> None:
    assert ask(app, "GET", "/nothing", x_request_id="e-1").headers["x-request-id"] == "e-1"
    assert ask(app, "PATCH", "/v1/decodes", x_request_id="e-2").headers["x-request-id"] == "e-2"
    assert ask(app, "PUT", "/v1/decodes/1", x_request_id="e-3").text == "e-3"  # in its state


def test_the_line_has_route_status_time_bytes_ids_and_caller(app: FastAPI, lines: Log) -> None:
    answer = ask(app, "POST", "/v1/decodes?signature=S3cr3t", x_request_id="r-1")
    found = access(lines)
    expected = {
        "method": "POST", "route": "/v1/decodes", "status": 200, "bytes": len(answer.content),
        "request_id": "r-1", "caller": "gallery", "job_id": JOB, "levelname": "INFO",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert isinstance(found["ms"], float) and 0 < found["ms"] < 10_000
    assert "S3cr3t" not in str(found)


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
def test_the_route_is_a_template(
    app: FastAPI, lines: Log,
    method: str, path: str, route: str, status: int, level: str,
) -> None:  # fmt: skip
    ask(app, method, path)
    found = access(lines)
    assert (found["route"], found["status"], found["levelname"]) == (route, status, level)


@pytest.mark.parametrize(("id", "job"), [(JOB, JOB), ("what%0Aever", None)])
def test_a_job_in_the_path_is_named(app: FastAPI, lines: Log, id: str, job: str | None) -> None:
    ask(app, "GET", f"/v1/decodes/{id}")
    assert access(lines).get("job_id") == job


def test_a_trace_that_comes_is_passed_on_and_logged(app: FastAPI, lines: Log) -> None:
    answer = ask(app, "POST", "/v1/decodes", traceparent=TRACEPARENT)
    assert answer.json()["traceparent"] == answer.headers["traceparent"] == TRACEPARENT
    assert access(lines)["trace_id"] == TRACEPARENT.split("-")[1]


def test_a_malformed_trace_is_not(app: FastAPI) -> None:
    answer = ask(app, "POST", "/v1/decodes", traceparent="00-zz-zz-01")
    assert "traceparent" not in answer.json() and "traceparent" not in answer.headers


def test_with_opentelemetry_the_answer_names_the_servers_span(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.setup("test")
    try:
        answer = ask(app, "POST", "/v1/decodes", traceparent=TRACEPARENT)
    finally:
        tracing.shutdown()
    own = answer.headers["traceparent"]
    assert own == answer.json()["traceparent"]
    assert own.split("-")[1] == TRACEPARENT.split("-")[1] and own != TRACEPARENT


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Its URL, at a real server."""
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


def test_events_pass_through_one_by_one(app: FastAPI, lines: Log) -> None:
    release.clear()
    with (
        served(app) as url,
        httpx.stream("GET", f"{url}/v1/decodes/{JOB}/events", trust_env=False) as answer,
    ):
        assert answer.headers["x-request-id"]
        parts = answer.iter_text()
        assert next(parts) == "data: first\n\n"
        assert not [x for x in lines.records if x.name == "afterimage.access"]  # it goes on
        release.set()
        assert next(parts) == "data: second\n\n"
    assert access(lines)["bytes"] == len("data: first\n\ndata: second\n\n")


def test_who_does_not_read_holds_nothing_for_long(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, lines: Log
) -> None:
    monkeypatch.setattr(requests, "SEND_S", 0.3)
    given_up = threading.Event()

    async def held() -> AsyncIterator[None]:
        try:
            yield
        finally:
            given_up.set()

    @app.get("/large", dependencies=[Depends(held)])
    async def large() -> Response:
        return Response(bytes(2**26))

    with served(app) as url, socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert given_up.wait(20)
        given_up.clear()
        assert httpx.get(f"{url}/large", trust_env=False).content == bytes(2**26)
        assert given_up.wait(20)
    unread, read = (x.__dict__["bytes"] for x in lines.records if x.name == "afterimage.access")
    assert unread < read == 2**26


def test_the_servers_traceback_carries_the_id(app: FastAPI, caplog: Log) -> None:
    seen: list[str] = []

    def note(_record: logging.LogRecord) -> bool:
        seen.append(logs.request_id.get())
        return True

    caplog.handler.addFilter(note)
    with served(app) as url, caplog.at_level(logging.ERROR, "uvicorn.error"):
        httpx.put(f"{url}/v1/decodes/1", headers={"X-Request-Id": "t-1"}, trust_env=False)
    (error,) = [x for x in caplog.records if x.name == "uvicorn.error" and x.exc_info]
    assert seen[caplog.records.index(error)] == "t-1"
    caplog.handler.removeFilter(note)
