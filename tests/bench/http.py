"""Benchmark of `instant` over HTTP, against the same decode in-process and a CompressAI server.

make bench PART=http

The servers run one after the other, each in a process with all cores. The client keeps a constant
number of requests in flight, all of them for different bitstreams: the service decodes equal ones
once. Responses are PNGs; the instant cache is off.
"""

import asyncio
import contextlib
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import image
from models.codec import bitstream, codec, zoo
from tests.bench import machine
from tests.bench.streams import QUALITY, shifted
from worker.settings import WorkerSettings, prepare_process

CONCURRENCY = (1, 2, 8, 32)
REQUESTS = {1: 30, 2: 40, 8: 60, 32: 96}
ALONE = 42
PICTURES = 2 * max(CONCURRENCY)
PLAIN = """
import io, sys
import torch, uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
sys.path.append({bench!r})
import decode as bench
from models import geometry
from models.codec import bitstream
net = bench.compressai(bench._codec("shipped"))
app = FastAPI()

def decode_png(data):
    b = bitstream.parse(data)
    shape = [side // 64 for side in geometry.padded(b.height, b.width)]
    with torch.inference_mode():
        x = net.decompress([[b.y_string], [b.z_string]], shape)["x_hat"]
    x = (x[0, :, :b.height, :b.width] * 255).round().byte().permute(1, 2, 0).contiguous()
    out = io.BytesIO()
    Image.fromarray(x.numpy()).save(out, "PNG")
    return out.getvalue()

@app.get("/livez")
def livez():
    return "ok"

@app.post("/v1/decodes")
async def decode(request: Request):
    from starlette.concurrency import run_in_threadpool
    png = await run_in_threadpool(decode_png, await request.body())
    return Response(png, media_type="image/png")

uvicorn.run(app, port={port}, log_level="warning")
"""


@contextlib.contextmanager
def server(plain: bool) -> Iterator[str]:
    """Run our service without workers, or the plain CompressAI server; yields its URL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = PLAIN.format(bench=str(Path(__file__).parent), port=port)
    ours = ["-m", "service.cli", "serve", "--port", str(port), "--workers", "0"]
    command = [sys.executable, "-P", "-W", "ignore", *(["-c", code] if plain else ours)]
    environment = os.environ | {"AFTERIMAGE_INSTANT_CACHE_BYTES": "0"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/livez").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def load(url: str, streams: Sequence[bytes], at_once: int, requests: int) -> dict[str, float]:
    """Send `requests` requests, `at_once` in flight; latencies in ms and pictures per second."""
    latencies: list[float] = []
    left = iter(list(itertools.islice(itertools.cycle(streams), requests)))
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def worker() -> None:
            for data in left:
                began = time.perf_counter()
                response = await client.post("/v1/decodes", content=data)
                response.raise_for_status()
                latencies.append((time.perf_counter() - began) * 1e3)

        await client.post("/v1/decodes", content=streams[0])
        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        seconds = time.perf_counter() - began
    percentiles = statistics.quantiles(latencies, n=100, method="inclusive")
    p50, p90, p99 = (percentiles[p - 1] for p in (50, 90, 99))
    result = {"p50": p50, "p90": p90, "p99": p99, "best": min(latencies)}
    return result | {"per_s": requests / seconds}


def side_by_side(url: str, data: bytes) -> dict[str, float]:
    """Median ms of single requests and of the same work in-process.

    They alternate, so that other load on the machine affects both.
    """
    q2 = zoo.load(QUALITY)
    b = bitstream.parse(data)
    rows: list[tuple[float, ...]] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for _ in range(ALONE):
            marks = [time.perf_counter()]
            response = client.post("/v1/decodes", content=data)
            marks.append(time.perf_counter())
            x_hat = q2.synthesis(q2.latents(bitstream.parse(data)).y_hat)
            pixels = codec.to_pixels(codec.crop(x_hat, b.height, b.width))
            marks.append(time.perf_counter())
            image.write(pixels, "png")
            marks.append(time.perf_counter())
            request, decode, png = ((y - x) * 1e3 for x, y in itertools.pairwise(marks))
            timing = response.headers["server-timing"]
            stages = sum(map(float, re.findall(r"dur=([\d.]+)", timing)))
            rows.append((request, decode, png, request - decode - png, request - stages))
    names = ("request", "decode", "png", "added", "around")
    return dict(zip(names, map(statistics.median, zip(*rows[2:], strict=True)), strict=True))


def main() -> int:
    prepare_process(WorkerSettings())
    formats: dict[str, bitstream.Format] = {"float": "compressai", "exact": "msh"}
    streams = {name: shifted(PICTURES, format) for name, format in formats.items()}
    alone: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for name in ("float", "exact", "plain CompressAI"):
        with server(name == "plain CompressAI") as url:
            if name in streams:
                alone[name] = side_by_side(url, streams[name][0])
            for at_once in CONCURRENCY:
                sent = streams.get(name, streams["float"])
                latencies = asyncio.run(load(url, sent, at_once, REQUESTS[at_once]))
                rows.append({"server": name, "at_once": at_once} | latencies)
    about = machine.describe()
    document = {"machine": about, "alone": alone, "rows": rows}
    machine.write("http", document, _table(rows, alone, about))
    return 0


def _table(
    rows: list[dict[str, Any]], alone: dict[str, dict[str, float]], about: dict[str, str]
) -> str:
    lines = [
        "# `instant` over HTTP, 768×512\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "\n",
        "| server | concurrent requests | p50 ms | p90 | p99 | best | pictures/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r[name]:.0f}" for name in ("p50", "p90", "p99", "best")]
        lines.append(f"| {r['server']} | {r['at_once']} | {' | '.join(cells)} | {r['per_s']:.1f} |")
    lines.append("\nSingle requests, alternating with the same work in-process (medians):\n")
    for name, ms in alone.items():
        lines.append(
            f"- {name}: the request takes {ms['request']:.0f} ms. In-process, decoding takes "
            f"{ms['decode']:.0f} ms and writing the PNG {ms['png']:.0f} ms, so HTTP adds "
            f"{ms['added']:.1f} ms. {ms['around']:.1f} ms of the request are outside the stages "
            f"of Server-Timing."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
