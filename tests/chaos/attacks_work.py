"""Attacks that make the service compute: large pictures for nobody, and too many at once."""

import functools
import io
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import numpy as np
import torch
from PIL import Image

from models import geometry
from models.codec import bitstream, rans, zoo
from models.codec.bitstream import Bitstream
from tests.support.attacks import Attack, Target, receive, send

FORMATS = ("image/png", "image/jpeg", "image/webp", "image/avif", "application/x-npy")
LEAVES_S = 0.15
"""How long an impatient client waits for its response."""
MEGABYTES_PER_MEGAPIXEL = 36
"""Memory that decoding or encoding takes; see Sizing in deploy/OPERATING.md."""
BUDGET_MB = 40.0 * MEGABYTES_PER_MEGAPIXEL
ENCODES_MB = 2 * 500.0
"""Memory of the windows of two encodes."""


@functools.cache
def large_bitstream(height: int = 4032, width: int = 4928) -> Bitstream:
    """A small bitstream of a large grey picture, which takes as long to decode as any other."""
    used = zoo.load(2)
    coder = used.latent_coder
    rows, columns = (side // geometry.STRIDE_Z for side in geometry.padded(height, width))
    z_symbols = np.zeros((coder.net.N, rows, columns), np.int32)
    with torch.inference_mode():  # only positions near the border differ from the others
        indexes, _ = coder._prior(z_symbols[:, :8, :8], "exact")
    indexes = indexes[:, _positions(4 * rows)][:, :, _positions(4 * columns)]
    channels = np.arange(coder.net.N, dtype=np.int32)[:, None, None]
    z_string = rans.encode(z_symbols, np.broadcast_to(channels, z_symbols.shape), coder.z_tables)
    symbols = np.zeros_like(indexes)
    y_string = rans.encode(symbols, indexes, coder.y_tables)
    crc = int(google_crc32c.value(symbols.tobytes()))
    return Bitstream(
        "msh", "exact", used.quality, used.metric, height, width, y_string, z_string,
        used.weights_id, crc,
    )  # fmt: skip


def _positions(count: int) -> list[int]:
    """Where each of `count` positions of y is found among 32, of which 16 are near a border."""
    middle = [16 + at % 4 for at in range(16, count - 16)]
    return [*range(16), *middle, *range(16, 32)]


@functools.cache
def large_avif(height: int = 4000, width: int = 5000) -> bytes:
    """An AVIF file of less than a kilobyte that holds a large grey picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(out, "AVIF", speed=10)
    return out.getvalue()


def variants(b: Bitstream) -> Iterator[bytes]:
    """Bitstreams that decode as `b` does, each with another size within the same padded size."""
    for rows, columns in itertools.product(range(31), repeat=2):
        yield bitstream.serialize(replace(b, height=b.height - rows, width=b.width - columns))


def request(path: str, data: bytes, accept: str = "image/png") -> bytes:
    """A POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _abandon(target: Target, requests: Iterator[bytes]) -> str:
    """Five clients that send requests, and leave after `LEAVES_S`, again and again."""
    lock, sent = threading.Lock(), Counter[str]()

    def client() -> None:
        while target.running():
            with lock:
                data = next(requests)
            with target.connections(1) as connections:
                for connection in connections:
                    sent["sent"] += send(connection, data)
                    connection.settimeout(LEAVES_S)
                    sent["answered"] += bool(receive(connection))

    with ThreadPoolExecutor(5) as pool:
        for _ in range(5):
            pool.submit(client)
    return f"{sent['sent']} requests, of which {sent['answered']} were answered at once"


def abandoned_decodes(target: Target) -> str:
    """A bitstream of 20 megapixels, asked for in five formats by clients that leave."""
    data = bitstream.serialize(large_bitstream())
    return _abandon(target, (request("/v1/decodes", data, f) for f in itertools.cycle(FORMATS)))


def abandoned_encodes(target: Target) -> str:
    """A photograph of 20 megapixels in less than a kilobyte, from clients that leave."""
    return _abandon(target, itertools.repeat(request("/v1/encodes", large_avif())))


def _at_once(target: Target, requests: Iterator[bytes], count: int = 64) -> str:
    """Clients that wait, all at once; they send again when they are refused."""
    lock, answers = threading.Lock(), Counter[str]()

    def client() -> None:
        while target.running():
            with lock:
                data = next(requests)
            with target.connections(1) as connections:
                for connection in connections:
                    send(connection, data)
                    connection.settimeout(20)
                    answers[receive(connection)[9:12].decode() or "none"] += 1
            pause.wait(1)

    pause = threading.Event()
    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    while target.running():
        pause.wait(0.1)
    return f"answers {dict(answers)}"


def large_decodes(target: Target) -> str:
    """64 bitstreams of 20 megapixels at once, each another one."""
    many = (request("/v1/decodes", data) for data in itertools.cycle(variants(large_bitstream())))
    return _at_once(target, many)


def large_encodes(target: Target) -> str:
    """64 photographs of 20 megapixels at once."""
    return _at_once(target, itertools.repeat(request("/v1/encodes", large_avif())))


Run = Callable[[Target], str]
_RUNS: dict[str, Run] = {
    "abandoned-decodes": abandoned_decodes,
    "abandoned-encodes": abandoned_encodes,
    "large-decodes": large_decodes,
    "large-encodes": large_encodes,
}
ATTACKS = {name: Attack(run, budget_mb=BUDGET_MB + ENCODES_MB) for name, run in _RUNS.items()}
