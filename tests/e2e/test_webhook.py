"""A receiver is told when a decode has ended, by the service as it is run."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook

from tests.chaos.attack_webhooks import slow_receivers
from tests.support.service import WEBHOOK_SECRET, Service
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def test_the_end_of_a_decode_is_told_signed(
    service: Service, webhook_port: int, small_msh: bytes
) -> None:
    told: list[Any] = []
    came = threading.Semaphore(0)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.append(Webhook(WEBHOOK_SECRET).verify(body, dict(self.headers.items())))
            self.send_response(204)
            self.end_headers()
            came.release()

        def log_message(self, *_: object) -> None:
            pass

    host, client = f"127.0.0.1:{webhook_port}", service.client
    asked: dict[str, str | int] = {"tier": "perceptual", "seed": 41}
    with HTTPServer(("127.0.0.1", webhook_port), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def submit(**changed: str | int) -> httpx.Response:
            params: dict[str, str | int] = {**asked, "webhook": f"http://{host}/told", **changed}
            return client.post("/v1/decodes", params=params, content=small_msh)

        answer = submit()
        location = answer.headers["location"]
        wait_for(client, location)
        assert came.acquire(timeout=20)
        assert submit().headers["x-cache"] == "hit"  # who asks for what is kept is told, too
        assert came.acquire(timeout=20)
        assert submit(webhook="https://127.0.0.1/told").status_code == 422
        answer = submit(tier="ddpm-1000", deadline_s=1)
        with service.stores() as store:  # nobody need ask about it
            key = store.key("interest", answer.headers["location"].rpartition("/")[2])
            interest: list[Any] = store.queue.zrange(key, 0, -1, withscores=True)
            ((_, until),) = interest
        assert until > time.time() + 23 * 3600
        client.delete(answer.headers["location"])  # who asked may withdraw
        ended = wait_for(client, answer.headers["location"])
        assert ended["status"] == "canceled"
        assert came.acquire(timeout=20)
        server.shutdown()
    assert len(told) == 3
    assert told.pop()["type"] == "decode.canceled"
    for event in told:
        assert event["type"] == "decode.succeeded"
        assert event["data"]["image"] == f"{location}/image"


def test_slow_receivers_do_not_delay_the_webhook_of_another_caller(
    service: Service, small_msh: bytes
) -> None:
    figures = slow_receivers(str(service.client.base_url), small_msh)
    assert 0 < figures.slow <= 4, figures  # the share of one caller
    assert figures.holds, figures
