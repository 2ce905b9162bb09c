"""Attacks that make the service compute: each takes a base URL and returns figures.

The ordinary client beside an attack has the attacker's address, and no two of its bitstreams are
the same, so that no picture comes from a cache.
"""

import itertools
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from models.codec import bitstream, zoo
from models.codec.bitstream import Bitstream
from tests.support import hostile

ORDINARY = Path(__file__).parents[1] / "data/kodim23.msh"
FORMATS = ("image/png", "image/jpeg", "image/webp", "image/avif", "application/x-npy")
LEAVES_S = 0.15
"""How long an impatient client waits for its response."""
MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


@dataclass
class Figures:
    """What an ordinary client sees: seconds of `/livez` and of decodes, memory in MiB."""

    livez_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the ordinary decodes
    attack_statuses: list[int] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)  # of the attack's refusals

    def __str__(self) -> str:
        parts = [f"decodes {sorted(set(self.statuses))}"]
        for name in ("livez_s", "decode_s", "rss_mib"):
            values = getattr(self, name)
            if values:
                middle, worst = statistics.median(values), max(values)
                parts.append(f"{name} median {middle:.2f}, max {worst:.2f}")
        answers = {s: self.attack_statuses.count(s) for s in sorted(set(self.attack_statuses))}
        return "; ".join([*parts, f"attack {answers}, Retry-After {sorted(set(self.retry_after))}"])


def variants(b: Bitstream) -> Iterator[bytes]:
    """Bitstreams that decode as `b` does, each with another size within the same padded size."""
    for less in itertools.count():
        rows, columns = divmod(less, 32)
        yield bitstream.serialize(replace(b, height=b.height - rows, width=b.width - columns))


ordinary = variants(bitstream.parse(ORDINARY.read_bytes()))


def post(url: str, path: str, data: bytes, accept: str = "image/png") -> socket.socket:
    """Send a request, and return the socket without reading the response."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), 60)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def leave(url: str, path: str, data: bytes, accept: str = "image/png") -> None:
    """Send a request, and close the connection after `LEAVES_S`."""
    with post(url, path, data, accept):
        time.sleep(LEAVES_S)


def decode(client: httpx.Client, figures: Figures) -> None:
    """Make an ordinary decode, and note its time and status."""
    began = time.perf_counter()
    answer = client.post("/v1/decodes", content=next(ordinary))
    figures.decode_s.append(time.perf_counter() - began)
    figures.statuses.append(answer.status_code)


def alone(url: str, count: int = 5) -> Figures:
    """The figures of a service that nobody else uses."""
    figures = Figures()
    with httpx.Client(base_url=url, timeout=120) as client, watched(url, figures):
        for _ in range(count):
            decode(client, figures)
    return figures


@contextmanager
def watched(url: str, figures: Figures) -> Iterator[None]:
    """Poll `/livez` and the API's memory while the block runs."""
    ended = threading.Event()

    def poll() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not ended.wait(0.05):
                began = time.perf_counter()
                client.get("/livez")
                figures.livez_s.append(time.perf_counter() - began)
                found = MEMORY.search(client.get("/metrics").text)
                if found:
                    figures.rss_mib.append(float(found[1]) / 2**20)

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(poll)
        try:
            yield
        finally:
            ended.set()
            polling.result()


def _attack(url: str, attack: Callable[[Figures], None], decodes: int) -> Figures:
    """Run `attack` in a thread, and ordinary decodes beside it."""
    figures = Figures()
    with (
        watched(url, figures),
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        attacking = pool.submit(attack, figures)
        time.sleep(4 * LEAVES_S)
        for _ in range(decodes):
            decode(client, figures)
        attacking.result()
    return figures


def abandoned_decodes(url: str, large: bytes, decodes: int = 2) -> Figures:
    """One large bitstream, asked for in five formats by clients that leave."""

    def attack(_: Figures) -> None:
        with ThreadPoolExecutor(len(FORMATS)) as pool:
            for accept in FORMATS:
                pool.submit(leave, url, "/v1/decodes", large, accept)

    return _attack(url, attack, decodes)


def abandoned_encodes(url: str, photo: bytes, decodes: int = 2) -> Figures:
    """Small files of large photographs, sent by clients that leave."""

    def attack(_: Figures) -> None:
        with ThreadPoolExecutor(8) as pool:
            for _number in range(8):
                pool.submit(leave, url, "/v1/encodes", photo)

    return _attack(url, attack, decodes)


def many_large(url: str, b: Bitstream, requests: int = 64, decodes: int = 5) -> Figures:
    """Large bitstreams, all at once and each another one, by clients that wait."""

    def attack(figures: Figures) -> None:
        def send(data: bytes) -> None:
            answer = httpx.post(f"{url}/v1/decodes", content=data, timeout=120)
            figures.attack_statuses.append(answer.status_code)
            if "retry-after" in answer.headers:
                figures.retry_after.append(int(answer.headers["retry-after"]))

        with ThreadPoolExecutor(requests) as pool:
            list(pool.map(send, itertools.islice(variants(b), requests)))

    return _attack(url, attack, decodes)


def main() -> int:
    """Print the figures of a service before, under and after each attack."""
    (url,) = sys.argv[1:]
    large = hostile.large_bitstream(zoo.load(2))
    attacks: dict[str, Callable[[], Figures]] = {
        "alone": lambda: alone(url),
        "abandoned decodes": lambda: abandoned_decodes(url, bitstream.serialize(large)),
        "abandoned encodes": lambda: abandoned_encodes(url, hostile.large_avif()),
        "many large decodes": lambda: many_large(url, large),
        "alone again": lambda: alone(url),
    }
    for name, attack in attacks.items():
        sys.stdout.write(f"{name}: {attack()}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
