"""A receiver is told when a decode has ended, by the service as it is run."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from tests.conftest import Service, run_service, wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_end_of_a_decode_is_told_signed(
    tmp_path: Path, redis_urls: tuple[str, str], small_msh: bytes
) -> None:
    told: list[Any] = []
    came = threading.Semaphore(0)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.append(Webhook(SECRET).verify(body, dict(self.headers.items())))
            self.send_response(204)
            self.end_headers()
            came.release()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        environment = {"AFTERIMAGE_WEBHOOK_SECRET": SECRET, "AFTERIMAGE_WEBHOOK_ALLOW": host}
        environment |= {"REDIS_URL": redis_urls[0], "CACHE_REDIS_URL": redis_urls[1]}
        environment |= {"AFTERIMAGE_PREFIX": "told"}
        with run_service(tmp_path, **environment) as service:
            asked = {"tier": "perceptual", "webhook": f"http://{host}/told"}
            answer = service.client.post("/v1/decodes", params=asked, content=small_msh)
            location = answer.headers["location"]
            wait_for(service.client, location)
            assert came.acquire(timeout=20)
            again = service.client.post("/v1/decodes", params=asked, content=small_msh)
            assert again.headers["x-cache"] == "hit"  # who asks for what is kept is told, too
            assert came.acquire(timeout=20)
            refused = {"tier": "perceptual", "webhook": "https://127.0.0.1/told", "seed": 1}
            answer = service.client.post("/v1/decodes", params=refused, content=small_msh)
            assert answer.status_code == 422
            long = {"tier": "ddpm-1000", "webhook": f"http://{host}/told", "deadline_s": 1}
            answer = service.client.post("/v1/decodes", params=long, content=small_msh)
            with service.stores() as store:  # nobody need ask about it
                key = f"told:interest:{answer.headers['location'].rpartition('/')[2]}"
                ((_, until),) = store.queue.zrange(key, 0, -1, withscores=True)
            assert until > time.time() + 23 * 3600
            service.client.delete(answer.headers["location"])  # who asked may withdraw
            ended = wait_for(service.client, answer.headers["location"])
            assert ended["status"] == "canceled"
            assert came.acquire(timeout=20)
        server.shutdown()
    assert len(told) == 3
    assert told.pop()["type"] == "decode.canceled"
    for event in told:
        assert event["type"] == "decode.succeeded"
        assert event["data"]["image"] == f"{location}/image"


def test_without_a_secret_webhooks_are_refused(service: Service, small_msh: bytes) -> None:
    asked = {"tier": "perceptual", "webhook": "https://example.org/", "seed": 77}
    answer = service.client.post("/v1/decodes", params=asked, content=small_msh)
    assert answer.status_code == 422
    assert "AFTERIMAGE_WEBHOOK_SECRET" in answer.json()["detail"]
