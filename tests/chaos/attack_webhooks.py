"""An attack by slow receivers of webhooks: another caller's webhook must arrive meanwhile.

The service needs `SETTINGS`, a webhook secret and, unless the picture is cached, a worker.
"""

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.attacks import Attack, Target
from tests.support.listening import listening
from tests.support.service import WEBHOOK_SECRET
from tests.support.waiting import until

RECEIVERS = "127.0.0.4"
"""Address of all receivers of webhooks."""
SETTINGS = {"AFTERIMAGE_WEBHOOK_ALLOW": RECEIVERS}
ATTACKER, VICTIM = "127.0.0.2", "127.0.0.3"
"""Addresses of two callers. The service trusts neither as a proxy."""
REQUESTS, URLS = 5, 8
"""Requests of an attack, each with the largest number of URLs."""
WEBHOOK_S, LIVEZ_S = 2.0, 0.5
"""Longest allowed delays of the other caller's webhook and of `/livez`."""
PATIENCE_S = 60.0
"""Longest wait for the webhook of the other caller, and for the attack to begin."""


@dataclass(frozen=True)
class Figures:
    """The effects of an attack."""

    webhook_s: float  # from the end of the other caller's decode to its webhook
    livez_s: float  # the longest of several
    slow: int  # slow deliveries that had begun by then

    @property
    def holds(self) -> bool:
        """True if other callers were not delayed for long."""
        return self.webhook_s <= WEBHOOK_S and self.livez_s <= LIVEZ_S

    def __str__(self) -> str:
        return (
            f"{REQUESTS * URLS} slow URLs, {self.slow} deliveries in progress: another caller's "
            f"webhook after {self.webhook_s:.2f} s, /livez after {self.livez_s:.2f} s"
        )


def slow_receivers(url: str, bitstream: bytes, seed: int = 2911) -> Figures:
    """Register 40 webhooks of one caller whose receivers hang; then measure another caller's."""
    with contextlib.ExitStack() as stack:
        attacker, victim = (stack.enter_context(_client(url, a)) for a in (ATTACKER, VICTIM))
        held: list[socket.socket] = []
        slow = [stack.enter_context(listening(held.append, RECEIVERS)) for _ in range(URLS)]
        port, arrived = stack.enter_context(_receiver())
        _decode(attacker, bitstream, seed, [])  # from now on the picture is cached
        for request in range(REQUESTS):
            urls = [f"http://{RECEIVERS}:{port}/{request}" for port in slow]
            _decode(attacker, bitstream, seed, urls)
        until(lambda: held, "a delivery begins", PATIENCE_S)
        livez = [_livez(victim) for _ in range(5)]
        _decode(victim, bitstream, seed, [f"http://{RECEIVERS}:{port}/"])
        began = time.monotonic()
        in_time = arrived.wait(PATIENCE_S)
        webhook_s = time.monotonic() - began if in_time else float("inf")
        livez += [_livez(victim) for _ in range(5)]
        return Figures(webhook_s, max(livez), len(held))


def attack(target: Target) -> str:
    """Slow receivers; the attack fails if another caller's webhook is late."""
    with (Path(__file__).parents[1] / "data/kodim23.msh").open("rb") as file:
        figures = slow_receivers(f"http://127.0.0.1:{target.port}", file.read())
    if not figures.holds:
        raise RuntimeError(str(figures))
    return str(figures)


ATTACKS = {
    "slow-receivers": Attack(attack, {**SETTINGS, "AFTERIMAGE_WEBHOOK_SECRET": WEBHOOK_SECRET})
}


def _client(url: str, address: str) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=url, transport=transport, timeout=60)


def _decode(client: httpx.Client, data: bytes, seed: int, webhooks: list[str]) -> None:
    """Return when the decode has succeeded and its webhooks are in the outbox."""
    params: dict[str, Any] = {"tier": "perceptual", "seed": seed, "webhook": webhooks}
    response = client.post("/v1/decodes", params=params, content=data).raise_for_status()
    location = response.headers["location"]

    def succeeded() -> bool:
        state = client.get(location, headers={"Prefer": "wait=20"}).raise_for_status()
        return bool(state.json()["status"] == "succeeded")

    until(succeeded, "the decode succeeds", PATIENCE_S)


def _livez(client: httpx.Client) -> float:
    began = time.monotonic()
    client.get("/livez").raise_for_status()
    return time.monotonic() - began


@contextlib.contextmanager
def _receiver() -> Iterator[tuple[int, threading.Event]]:
    """Accept webhooks; yields the port, and an event that the first sets."""
    arrived = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer((RECEIVERS, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            yield server.server_address[1], arrived
        finally:
            server.shutdown()
