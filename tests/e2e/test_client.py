"""The Python client against a real service."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from models import image
from models.errors import Canceled
from service.cli.main import main
from service.client import ApiError, AsyncClient, Client
from tests.support.service import Service, fork_service
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.usefixtures("loaded_once")]


@pytest.fixture
def url(service: Service) -> str:
    return str(service.client.base_url)


def stream(client: Client, photo: image.Pixels, at: int) -> bytes:
    """Bitstream of a part of the photograph; each `at` gives another one."""
    cut = photo[at : at + 60, at : at + 64].copy()
    return client.encode(image.write(cut, "png"))


def location(service: Service, data: bytes, steps: int) -> str:
    """URL path of the `ddim-100` decode with this number of steps."""
    params: dict[str, str | int] = {"tier": "ddim-100", "steps": steps}
    return service.client.post("/v1/decodes", params=params, content=data).headers["location"]


def test_decode_yields_draft_progress_and_final_picture(url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 11)
        assert client.inspect(data)["width"] == 64
        updates = list(client.decode(data, "ddim-10", steps=40, format="webp"))
        kinds = [u.kind for u in updates]
        assert (kinds[0], kinds[1], kinds[-1]) == ("draft", "queued", "final")
        assert [u.step for u in updates if u.kind == "progress"] == list(range(1, 41))
        final = updates[-1]
        assert (final.tier, final.picture is not None) == ("ddim-10", True)
        assert image.read(final.picture or b"", 10**6).shape == (60, 64, 3)
        assert updates[0].picture != final.picture
        again = list(client.decode(data, "ddim-10", steps=40, format="webp"))
        assert [u.kind for u in again] == ["final"]
        assert again[0].picture == final.picture
        assert [u.kind for u in client.decode(data, "instant")] == ["final"]


def test_a_picture_queued_under_another_tier_s_name_is_used(
    service: Service, url: str, photo: image.Pixels
) -> None:
    with Client(url) as client:
        data = stream(client, photo, 31)
        params: dict[str, str | int] = {"tier": "ddpm-100", "steps": 3}
        service.client.post("/v1/decodes", params=params, content=data)
        updates = list(client.decode(data, "ddpm-1000", steps=3))
        assert (updates[-1].kind, updates[-1].tier) == ("final", "ddpm-100")


async def _collect(url: str, data: bytes) -> list[str]:
    async with AsyncClient(url) as client:
        return [update.kind async for update in client.decode(data, seed=5)]


def test_the_async_client_yields_the_same_updates(url: str, photo: image.Pixels) -> None:
    import anyio

    with Client(url) as client:
        data = stream(client, photo, 23)
    kinds = anyio.run(_collect, url, data)
    assert (kinds[0], kinds[-1]) == ("draft", "final")


def test_previews_are_picture_files(service: Service, url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 37)
        for update in client.decode(data, "ddim-100", steps=600):
            if update.kind == "preview":
                assert image.read(update.picture or b"", 10**6).shape == (60, 64, 3)
                break
        else:
            pytest.fail("no preview came")
        client.cancel(location(service, data, 600))  # it would delay other tests


def test_an_error_response_raises_api_error_with_the_problem(url: str, small_msh: bytes) -> None:
    with Client(url) as client:
        with pytest.raises(ApiError, match="unknown tier") as refused:
            list(client.decode(small_msh, "best"))
        assert refused.value.status == 422
        with pytest.raises(ApiError) as refused:
            list(client.decode(b""))
        assert refused.value.status == 400
        assert refused.value.problem["type"].startswith("urn:afterimage:problem:")


def test_a_redirect_is_an_error_with_its_target(url: str, tmp_path: Path) -> None:
    class Redirecting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(308)
            self.send_header("Location", url)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            with pytest.raises(ApiError, match=f"redirected to {url}"):
                list(client.decode(b"bytes"))
        server.shutdown()


def test_a_given_http_client_gets_base_url_and_key() -> None:
    http = httpx.AsyncClient(timeout=1)
    AsyncClient("https://there.example", "secret", http=http)
    assert http.base_url.host == "there.example"
    assert http.headers["authorization"] == "Bearer secret"


def test_an_invalid_url_leaves_no_thread_running() -> None:
    before = threading.active_count()
    with pytest.raises(httpx.InvalidURL):
        Client("http://host:port")
    assert threading.active_count() == before


def test_a_canceled_decode_raises_canceled(service: Service, url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 41)
        with pytest.raises(Canceled):
            for update in client.decode(data, "ddim-100", steps=900):
                if update.kind == "queued":
                    client.cancel(location(service, data, 900))


def test_events_continue_at_another_api_process_when_one_is_killed(
    service: Service, url: str, tmp_path: Path, photo: image.Pixels
) -> None:
    """Two API processes share one Redis; the client reconnects to the second one."""
    stores = {"REDIS_URL": service.urls[0], "CACHE_REDIS_URL": service.urls[1]}
    with Client(url) as client:
        data = stream(client, photo, 53)
    with fork_service(tmp_path, "--workers", "0", **stores) as first:
        first_url = str(first.client.base_url)

        class Balancer(httpx.AsyncHTTPTransport):
            """Sends requests to the first process while it runs, then to the other."""

            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                exited = first.process.poll() is not None
                target = httpx.URL(url if exited else first_url)
                request.url = request.url.copy_with(host=target.host, port=target.port)
                return await super().handle_async_request(request)

        async def listen() -> list[str]:
            http = httpx.AsyncClient(transport=Balancer(), timeout=60)
            kinds: list[str] = []
            async with AsyncClient(first_url, http=http) as client:
                async for update in client.decode(data, "ddim-100", steps=50):
                    kinds.append(update.kind)
                    if kinds.count("progress") == 3:
                        first.process.kill()
                        first.process.wait()
            return kinds

        import anyio

        kinds = anyio.run(listen)
        assert kinds[-1] == "final"
        assert kinds.count("progress") == 50
        assert kinds.count("started") == 1


def test_the_decode_command_can_use_a_service(
    url: str, tmp_path: Path, small_msh: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    source, out = str(tmp_path / "a.msh"), tmp_path / "a.webp"
    assert main(["decode", source, "-o", str(out), "--url", url, "--tier", "ddim-10"]) == 0
    remote = image.read(out.read_bytes(), 10**6)
    assert main(["decode", source, "-o", str(tmp_path / "b.png"), "--tier", "ddim-10"]) == 0
    local = image.read((tmp_path / "b.png").read_bytes(), 10**6)
    assert np.abs(remote.astype(int) - local).max() <= 1  # rounding depends on threads
    assert main(["decode", source, "-o", str(out), "--url", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert "Traceback" not in error


class Silent(ThreadingHTTPServer):
    """A service that accepts each decode, sends a draft and one event, and then nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SilentHandler)
        self.following = threading.Event()  # a client waits for events
        self.left = threading.Event()  # it has closed the connection
        self.url = f"http://127.0.0.1:{self.server_port}"


class _SilentHandler(BaseHTTPRequestHandler):
    server: Silent

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Location", "/v1/decodes/1")
        self.send_header("X-Afterimage-Tier", "instant")
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"draft")

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"id: 1\nevent: queued\ndata: {}\n\n")
        self.server.following.set()
        self.rfile.read(1)  # returns when the client disconnects
        self.server.left.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def silent() -> Iterator[Silent]:
    with Silent() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Restore the default of SIGINT, also for child processes. A shell that starts background jobs
    lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_remote_decode_ends_it_without_traceback_and_output(
    silent: Silent, tmp_path: Path
) -> None:
    (tmp_path / "a.msh").write_bytes(b"bytes")
    decode = ["decode", "a.msh", "-o", "a.png", "--tier", "perceptual", "--url", silent.url]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "service.cli", *decode],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert silent.following.wait(60)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "aclose" not in error
    assert [f.name for f in tmp_path.iterdir()] == ["a.msh"]


@pytest.mark.usefixtures("ctrl_c")
def test_a_client_whose_caller_is_interrupted_closes_the_decode_and_can_be_used_again(
    silent: Silent,
) -> None:
    def interrupt() -> None:
        until(lambda: updates.gi_running, "the next step")  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGINT)

    with Client(silent.url) as client:
        updates = client.decode(b"bytes")
        assert [next(updates).kind, next(updates).kind] == ["draft", "queued"]
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            next(updates)
        assert silent.left.wait(10)
        again = client.decode(b"bytes")
        assert next(again).kind == "draft"
    del again  # unfinished: closing it after its client must not print an error


def test_an_async_decode_that_is_left_early_closes_its_event_stream(silent: Silent) -> None:
    import anyio

    async def leave() -> None:
        async with AsyncClient(silent.url) as client:
            async with contextlib.aclosing(client.decode(b"bytes")) as updates:
                assert (await anext(updates)).kind == "draft"
                assert (await anext(updates)).kind == "queued"
            assert await anyio.to_thread.run_sync(silent.left.wait, 10)

    anyio.run(leave)
