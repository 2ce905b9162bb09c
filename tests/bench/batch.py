"""Benchmark of batches from and to a local S3 server.

make bench PART=batch

1. Throughput: a batch against as many POSTs by hand, in alternating rounds, same workers.
2. A target written to, and a result read from the S3 server, beyond the picture's bytes.
3. Latency of interactive jobs beside a batch of 100,000 waiting items, and what that takes of the
   API's memory.

With `--pictures 1000 --rounds 1 --only throughput`, one long round takes 12 minutes on two cores.
"""

import argparse
import concurrent.futures
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.image import MEDIA_TYPES
from tests.bench import machine
from tests.support.batches import counts, state
from tests.support.object_server import s3_server, s3_settings
from tests.support.rig import Rig, rig
from tests.support.service import Service, fork_service
from tests.support.waiting import until
from worker.queue import events, object_stores
from worker.queue.object_stores import ObjectStores
from worker.queue.references import Reference
from worker.settings import WorkerSettings

PHOTO = Path(__file__).parents[1] / "data/kodim23.msh"
SETTINGS: dict[str, str | int] = {"tier": "perceptual"}
"""The cheapest drawing, so that what batches add is the largest part of it."""
PICTURES, ROUNDS = 24, 6
"""Pictures of a round, and pairs of rounds."""
WORKERS, USERS = 2, 8
WAITING = 100_000
INTERACTIVE_S, PARTS = 30.0, 2
"""Duration of each part, and parts with and without a batch."""
TRIES = 12
"""Targets and results that are timed."""
LIMITS = {"throughput": 0.95, "store_ms": 20.0, "p99": 1.5, "api_mb": 20.0}


@dataclass(slots=True)
class Bench:
    """The running processes."""

    own: Rig
    service: Service
    objects: ObjectStores
    seeds: Iterator[int] = field(default_factory=itertools.count)
    names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def client(self) -> httpx.Client:
        return self.service.client

    def post(self, **more: str | int) -> httpx.Response:
        """Submit a decode of the photograph that is not known yet."""
        answer = self.client.post(
            "/v1/decodes",
            params={**SETTINGS, "seed": next(self.seeds), **more},
            content=PHOTO.read_bytes(),
            headers={"Prefer": "respond-async"},
        )
        answer.raise_for_status()
        return answer

    def submit_batch(self, count: int) -> str:
        """Submit a batch of new decodes of the photograph; returns its URL."""
        folder = next(self.names)
        items = [
            {"source": "store:s3/in/kodim23.msh", "target": f"store:s3/{folder}/{n:06d}.png",
             "seed": next(self.seeds)}
            for n in range(count)
        ]  # fmt: skip
        answer = self.client.post("/v1/batches", json={"items": items, **SETTINGS}, timeout=300)
        answer.raise_for_status()
        return str(answer.headers["location"])

    def count(self, name: str) -> float:
        """A counter of the workers."""
        return float(self.own.store.queue.hget(self.own.store.key("metrics"), name) or 0)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of the API, of the queue's Redis and of the workers so far."""
        pids = {
            "API": [self.service.process.pid],
            "Redis": [self.own.queue.process.pid],
            "workers": [w.process.pid for w in self.own.workers],
        }
        return {name: sum(map(_cpu_s, ids)) for name, ids in pids.items()}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(folder: Path) -> Iterator[Bench]:
    with s3_server(folder / "s3") as port:
        stores = s3_settings(folder, port)
        service = {"AFTERIMAGE_RESULTS": "store:s3/results", "AFTERIMAGE_MAX_BACKLOG_S": "100000"}
        with (
            mock.patch.dict(os.environ, stores),
            rig(folder / "rig", forked=False, AFTERIMAGE_BATCH="1", **stores) as own,
            fork_service(own.folder, "--workers", "0", **own.urls, **stores, **service) as api,
        ):
            for _ in range(WORKERS):
                own.worker().ready()
            objects = object_stores.connect(WorkerSettings())
            source = Reference("s3", "in/kodim23.msh")
            objects.write(source, PHOTO.read_bytes(), "application/octet-stream", {})
            yield Bench(own, api, objects)


def by_hand(bench: Bench, count: int) -> Callable[[], bool]:
    """Submit decodes with four clients; returns whether they have ended."""
    done = bench.count("ended:succeeded") + count
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for answer in [pool.submit(bench.post) for _ in range(count)]:
            answer.result()
    return lambda: bench.count("ended:succeeded") >= done


def as_batch(bench: Bench, count: int) -> Callable[[], bool]:
    """Submit a batch; returns whether its targets are written."""
    done = bench.count("targets:written") + count
    bench.submit_batch(count)
    return lambda: bench.count("targets:written") >= done


def timed(
    bench: Bench, way: Callable[[Bench, int], Callable[[], bool]], count: int
) -> tuple[float, dict[str, float]]:
    """Pictures a second from the first that a worker took, and CPU milliseconds per picture."""
    cpu, began = bench.cpu_s(), threading.Event()
    first: list[float] = []

    def look() -> None:
        until(lambda: bench.own.jobs.running, "the first drawing", 300)
        first.append(time.monotonic())
        began.set()

    looking = threading.Thread(target=look)
    looking.start()
    ended = way(bench, count)
    until(ended, "the pictures", 3600)
    spent = time.monotonic() - (first[0] if began.wait(1) else 0)
    looking.join()
    after = bench.cpu_s()
    return count / spent, {name: 1e3 * (after[name] - cpu[name]) / count for name in cpu}


def throughput(bench: Bench, pictures: int, rounds: int) -> dict[str, Any]:
    """Rates of both ways, and the interval of the median ratio by a bootstrap."""
    ways = {"by hand": by_hand, "batch": as_batch}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            rate, spent = timed(bench, ways[name], pictures)
            rates[name].append(rate)
            cpu[name].append(spent)
            print(f"{name}: {rate:.2f} pictures/s, load {os.getloadavg()[0]:.1f}", flush=True)  # noqa: T201
    ratios = np.array(rates["batch"]) / np.array(rates["by hand"])
    samples = np.random.default_rng(0).choice(ratios, (2000, rounds))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return {
        "pictures": pictures, "rounds": rounds, "rates": rates, "ratio": float(np.median(ratios)),
        "low": float(low), "high": float(high),
        "cpu_ms": {
            name: {part: float(np.median([r[part] for r in rows])) for part in rows[0]}
            for name, rows in cpu.items()
        },
    }  # fmt: skip


def stores(bench: Bench) -> dict[str, float]:
    """Median milliseconds of a target and of a result, and of the picture's bytes alone."""
    rows: dict[str, list[float]] = {n: [] for n in ("target", "put", "result", "cached", "get")}
    queue, jobs = bench.own.store.queue, bench.own.jobs
    for number in range(TRIES):
        id = bench.post(target=f"store:s3/one/{number}.png").headers["location"].rpartition("/")[2]
        key = events.key(jobs.store, id)

        def ends(key: str = key) -> list[int]:
            """Times of the end of the drawing and of the write, in milliseconds."""
            found: Any = queue.xrange(key)
            return [int(e[0].split(b"-")[0]) for e in found if e[1][b"kind"] == b"completed"]

        until(lambda ends=ends: len(ends()) == 2, "the target")  # type: ignore[misc]
        rows["target"].append(ends()[1] - ends()[0])
        png = bench.objects.read(Reference("s3", f"one/{number}.png"), 10**8)
        rows["put"].append(_ms(lambda: _write(bench, f"plain/{number}.png", png)))  # noqa: B023
        _write(bench, f"results/{id}.png", png)
        plain = Reference("s3", f"results/{id}.png")
        rows["get"].append(_ms(lambda: bench.objects.read(plain, 10**8)))  # noqa: B023
        path = f"/v1/decodes/{id}/image"
        bench.client.get(path, params={"min_tier": "perceptual"}).raise_for_status()
        rows["cached"].append(_ms(lambda: bench.client.get(path)))  # noqa: B023
        bench.own.store.cache.flushall()
        rows["result"].append(_ms(lambda: bench.client.get(path)))  # noqa: B023
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    return middle | {
        "target_beyond": middle["target"] - middle["put"],
        "result_beyond": middle["result"] - middle["cached"] - middle["get"],
        "kb": len(png) / 1e3,
    }


def _write(bench: Bench, name: str, png: bytes) -> None:
    bench.objects.write(Reference("s3", name), png, MEDIA_TYPES["png"], {})


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def users(bench: Bench, seconds: float) -> list[float]:
    """Seconds of the jobs of `USERS` users, each of whom submits the next one after the last."""
    end = time.monotonic() + seconds

    def one() -> list[float]:
        spent = []
        while time.monotonic() < end:
            began = time.monotonic()
            location, status = bench.post().headers["location"], "queued"
            while status in {"queued", "running"}:
                answer = bench.client.get(location, headers={"Prefer": "wait=30"})
                status = answer.json()["status"]
            spent.append(time.monotonic() - began)
        return spent

    with concurrent.futures.ThreadPoolExecutor(USERS) as pool:
        return [
            s for one_user in [pool.submit(one) for _ in range(USERS)] for s in one_user.result()
        ]


def interactive(bench: Bench) -> dict[str, Any]:
    """Percentiles of interactive jobs with and without a waiting batch, and its memory."""
    pid, info = bench.service.process.pid, bench.own.store.queue.info
    spent: dict[str, list[float]] = {"alone": [], "beside": []}
    bench.client.delete(bench.submit_batch(WAITING))  # the first large request takes buffers
    time.sleep(5)
    users(bench, 5)
    for _ in range(PARTS):
        until(lambda: not bench.own.jobs.running and not bench.own.jobs.line.job_ids(), "idle", 300)
        spent["alone"] += users(bench, INTERACTIVE_S)
        before = machine.resident_mb(pid), info("memory")["used_memory"]
        location = bench.submit_batch(WAITING)
        time.sleep(5)
        held = machine.resident_mb(pid) - before[0], info("memory")["used_memory"] - before[1]
        spent["beside"] += users(bench, INTERACTIVE_S)
        drawn = counts(state(bench.client, location)).get("succeeded", 0)
        bench.client.delete(location)
    rng = np.random.default_rng(0)
    p99 = {
        name: np.percentile(rng.choice(values, (2000, len(values))), 99, axis=1)
        for name, values in spent.items()
    }
    low, high = np.percentile(p99["beside"] / p99["alone"], [2.5, 97.5])
    return {
        "jobs": {name: len(values) for name, values in spent.items()},
        "p50_s": {name: float(np.median(values)) for name, values in spent.items()},
        "p99_s": {name: float(np.percentile(values, 99)) for name, values in spent.items()},
        "ratio": float(np.percentile(spent["beside"], 99) / np.percentile(spent["alone"], 99)),
        "low": float(low), "high": float(high), "items_drawn": drawn,
        "api_mb": held[0], "redis_mb": held[1] / 1e6,
    }  # fmt: skip


def told(name: str, row: dict[str, Any]) -> str:
    """What a part has measured, in words."""
    if name == "throughput":
        cpu = "; ".join(
            f"{way}: " + ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items())
            for way, parts in row["cpu_ms"].items()
        )
        rates = " and ".join(f"{np.median(r):.2f} {way}" for way, r in row["rates"].items())
        return (
            f"Throughput: {row['rounds']} pairs of rounds of {row['pictures']} pictures; pictures "
            f"a second: {rates}. Batch over by hand: {row['ratio']:.3f} in the median (95 %: "
            f"{row['low']:.3f} to {row['high']:.3f}; limit {LIMITS['throughput']}). CPU "
            f"milliseconds per picture: {cpu}."
        )
    if name == "stores":
        return (
            f"Object store: a target of {row['kb']:.0f} kB is written {row['target']:.1f} ms after "
            f"the end of the drawing, {row['target_beyond']:.1f} ms more than a PUT of these bytes "
            f"takes. A result that the cache has lost takes {row['result']:.1f} ms, "
            f"{row['result_beyond']:.1f} ms more than one from the cache ({row['cached']:.1f} ms) "
            f"and a GET of these bytes. Limit {LIMITS['store_ms']:.0f} ms."
        )
    return (
        f"Interactive jobs of {USERS} users: p99 {row['p99_s']['alone']:.2f} s alone, "
        f"{row['p99_s']['beside']:.2f} s beside a batch of {WAITING:,} waiting items: "
        f"{row['ratio']:.2f} times (95 %: {row['low']:.2f} to {row['high']:.2f}; limit "
        f"{LIMITS['p99']}); p50 {row['p50_s']['alone']:.2f} and {row['p50_s']['beside']:.2f} s, of "
        f"{row['jobs']['alone']} and {row['jobs']['beside']} jobs. {row['items_drawn']} items were "
        f"drawn in the last part. The waiting batch takes {row['api_mb']:.0f} MB of the API and "
        f"{row['redis_mb']:.0f} MB of Redis (limit {LIMITS['api_mb']:.0f} MB)."
    )


def holds(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether all that was measured is within the limits."""
    checks = {
        "throughput": lambda r: r["ratio"] >= LIMITS["throughput"],
        "stores": lambda r: max(r["target_beyond"], r["result_beyond"]) <= LIMITS["store_ms"],
        "interactive": lambda r: (
            r["ratio"] <= LIMITS["p99"] and max(r["api_mb"], r["redis_mb"]) <= LIMITS["api_mb"]
        ),
    }
    return all(checks[name](row) for name, row in rows.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", choices=("throughput", "stores", "interactive"))
    asked = parser.parse_args()
    parts: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "throughput": lambda bench: throughput(bench, asked.pictures, asked.rounds),
        "stores": stores,
        "interactive": interactive,
    }
    load = os.getloadavg()[0]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as bench:
        timed(bench, as_batch, 4)  # warms up
        timed(bench, by_hand, 4)
        for name, part in parts.items():
            if asked.only in {None, name}:
                rows[name] = part(bench)
                print(told(name, rows[name]), flush=True)  # noqa: T201
    about = machine.describe()
    about |= {"load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"}
    lines = [
        "# Batches, 768×512, `perceptual`, from and to a local S3 server",
        f"{', '.join(f'{k} {v}' for k, v in about.items())}; {WORKERS} workers of one thread",
        *(told(name, row) for name, row in rows.items()),
    ]
    name = "batch" if asked.only is None else f"batch-{asked.only}"
    machine.write(name, {"machine": about} | rows, "\n\n".join(lines) + "\n")
    return 0 if holds(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
