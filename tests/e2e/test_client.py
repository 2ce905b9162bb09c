"""The Python client against a real service."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from models import image
from models.errors import Canceled
from service.cli.main import main
from service.client import ApiError, AsyncClient, Client
from tests.support.service import Service, run_service

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.usefixtures("loaded_once")]


@pytest.fixture
def url(service: Service) -> str:
    return str(service.client.base_url)


def stream(client: Client, photo: image.Pixels, at: int) -> bytes:
    cut = photo[at : at + 90, at : at + 140].copy()
    return client.encode(image.write(cut, "png"))


def location(service: Service, data: bytes, steps: int) -> str:
    """Of the `ddim-100` decode with so many steps."""
    asked = {"tier": "ddim-100", "steps": steps}
    return service.client.post("/v1/decodes", params=asked, content=data).headers["location"]


def test_a_decode_is_a_draft_then_progress_then_the_picture(url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 11)
        assert client.inspect(data)["width"] == 140
        updates = list(client.decode(data, "ddim-10", steps=80, format="webp"))
        kinds = [u.kind for u in updates]
        assert (kinds[0], kinds[1], kinds[-1]) == ("draft", "queued", "final")
        assert [u.step for u in updates if u.kind == "progress"] == list(range(1, 81))
        final = updates[-1]
        assert (final.tier, final.picture is not None) == ("ddim-10", True)
        assert image.read(final.picture or b"", 10**6).shape == (90, 140, 3)
        assert updates[0].picture != final.picture
        again = list(client.decode(data, "ddim-10", steps=80, format="webp"))
        assert [u.kind for u in again] == ["final"]
        assert again[0].picture == final.picture
        assert [u.kind for u in client.decode(data, "instant")] == ["final"]


def test_a_decode_that_another_asked_for_by_another_name_is_had(
    service: Service, url: str, photo: image.Pixels
) -> None:
    with Client(url) as client:
        data = stream(client, photo, 31)
        asked = {"tier": "ddpm-100", "steps": 3}
        service.client.post("/v1/decodes", params=asked, content=data)
        updates = list(client.decode(data, "ddpm-1000", steps=3))
        assert (updates[-1].kind, updates[-1].tier) == ("final", "ddpm-100")


async def _collect(url: str, data: bytes) -> list[str]:
    async with AsyncClient(url) as client:
        return [update.kind async for update in client.decode(data, seed=5)]


def test_the_same_without_threads(url: str, photo: image.Pixels) -> None:
    import anyio

    with Client(url) as client:
        data = stream(client, photo, 23)
    kinds = anyio.run(_collect, url, data)
    assert (kinds[0], kinds[-1]) == ("draft", "final")


def test_previews_are_pictures(service: Service, url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 37)
        for update in client.decode(data, "ddim-100", steps=600):
            if update.kind == "preview":
                assert image.read(update.picture or b"", 10**6).shape == (90, 140, 3)
                break
        else:
            pytest.fail("no preview came")
        client.cancel(location(service, data, 600))  # others wait behind it


def test_refusals_are_errors_with_the_problem(url: str, small_msh: bytes) -> None:
    with Client(url) as client:
        with pytest.raises(ApiError, match="unknown tier") as refused:
            list(client.decode(small_msh, "best"))
        assert refused.value.status == 422
        with pytest.raises(ApiError) as refused:
            list(client.decode(b""))
        assert refused.value.status == 400
        assert refused.value.problem["type"].startswith("urn:afterimage:problem:")


def test_a_redirect_is_told(url: str, tmp_path: Path) -> None:
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


def test_a_transport_that_is_brought_along_gets_address_and_key() -> None:
    http = httpx.AsyncClient(timeout=1)
    AsyncClient("https://there.example", "secret", http=http)
    assert http.base_url.host == "there.example"
    assert http.headers["authorization"] == "Bearer secret"


def test_a_wrong_address_leaves_nothing_running() -> None:
    before = threading.active_count()
    with pytest.raises(httpx.InvalidURL):
        Client("http://host:port")
    assert threading.active_count() == before


def test_a_canceled_decode_says_so(service: Service, url: str, photo: image.Pixels) -> None:
    with Client(url) as client:
        data = stream(client, photo, 41)
        with pytest.raises(Canceled):
            for update in client.decode(data, "ddim-100", steps=900):
                if update.kind == "queued":
                    client.cancel(location(service, data, 900))


def test_a_restarted_service_does_not_lose_its_listeners(
    service: Service, url: str, tmp_path: Path, photo: image.Pixels
) -> None:
    """Two API processes over one Redis: the events go on at the other when the first is gone."""
    stores = {"REDIS_URL": service.urls[0], "CACHE_REDIS_URL": service.urls[1]}
    with Client(url) as client:
        data = stream(client, photo, 53)
    with run_service(tmp_path, "--workers", "0", **stores) as own:
        there = str(own.client.base_url)

        class Balancer(httpx.AsyncHTTPTransport):
            """To our own, at first; to the other once that is gone."""

            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                gone = own.process.poll() is not None
                target = httpx.URL(url if gone else there)
                request.url = request.url.copy_with(host=target.host, port=target.port)
                return await super().handle_async_request(request)

        async def listen() -> list[str]:
            http = httpx.AsyncClient(transport=Balancer(), timeout=60)
            kinds = []
            async with AsyncClient(there, http=http) as client:
                async for update in client.decode(data, "ddim-100", steps=100):
                    kinds.append(update.kind)
                    if kinds.count("progress") == 3:
                        own.process.kill()
                        own.process.wait()
            return kinds

        import anyio

        kinds = anyio.run(listen)
        assert kinds[-1] == "final"
        assert kinds.count("progress") == 100
        assert kinds.count("started") == 1


def test_the_command_line_draws_at_a_service(
    url: str, tmp_path: Path, small_msh: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    source, out = str(tmp_path / "a.msh"), tmp_path / "a.webp"
    assert main(["decode", source, "-o", str(out), "--url", url, "--tier", "ddim-10"]) == 0
    there = image.read(out.read_bytes(), 10**6)
    assert main(["decode", source, "-o", str(tmp_path / "b.png"), "--tier", "ddim-10"]) == 0
    here = image.read((tmp_path / "b.png").read_bytes(), 10**6)
    assert np.abs(there.astype(int) - here).max() <= 1  # other threads, other roundings
    assert main(["decode", source, "-o", str(out), "--url", "http://127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert "127.0.0.1:1" in told
    assert "Traceback" not in told
