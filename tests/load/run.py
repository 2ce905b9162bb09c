"""A local service under load: `make load`.

For 1, 2 and 4 workers and 1 and 2 API processes on this machine: instant pictures per second with
their p50 and p99, upgrades per minute, the memory that a job and a picture take in Redis, and the
resident memory of the processes. Then the same users beside a batch. locust runs in another process
and sends to loopback addresses only.
"""

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.bench.streams import shifted
from tests.support.object_server import s3_server, s3_settings
from tests.support.rig import Rig, rig
from tests.support.service import Service, run_service
from worker.queue import object_stores
from worker.queue.references import Reference
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
LOCUST = ROOT / ".venv/load/bin/locust"
BITSTREAM = ROOT / "tests/data/kodim23.msh"
USERS, PICTURES = 8, 16
"""Users, and different pictures for which they ask."""
PHOTO = "768×512"
ITEMS = 10_000
"""Pictures of the batch; more than are drawn while users are measured."""
LOAD_COLUMNS = {
    "workers": "workers", "threads": "threads each", "apis": "API processes",
    "instant_s": "instant pictures/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms",
    "upgrades_min": "upgrades/min", "kb_a_job": "queue kB a job",
    "kb_a_picture": "cache kB a picture", "api_mb": "API MB, idle", "api_busy_mb": "busy",
    "worker_mb": "worker MB",
}  # fmt: skip
BATCH_COLUMNS = {
    "users": "users", "instant_s": "instant pictures/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms",
    "upgrades_min": "users' upgrades/min", "upgrade_p50_s": "p50 s", "upgrade_p99_s": "p99 s",
    "items_min": "batch pictures/min",
}  # fmt: skip


def pictures(rig: Rig) -> int:
    return sum(1 for _ in rig.store.cache.scan_iter(rig.store.key("picture", "*")))


@contextlib.contextmanager
def services(rig: Rig, count: int, **settings: str) -> Iterator[list[Service]]:
    """Start API processes that share the queue of `rig`."""
    settings |= {"AFTERIMAGE_INSTANT_CACHE_BYTES": "0", "AFTERIMAGE_MAX_BACKLOG_S": "10000"}
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            folder = rig.folder / f"api-{number}"
            folder.mkdir(exist_ok=True)
            service = run_service(folder, "--workers", "0", **rig.urls, **settings)
            started.append(stack.enter_context(service))
        yield started


def locust(services: list[Service], upgrades: bool, seconds: float) -> dict[str, dict[str, str]]:
    """Run the users and return locust's rows by name. Raises `RuntimeError` if a request failed."""
    hosts = " ".join(str(s.client.base_url).rstrip("/") for s in services)
    with tempfile.TemporaryDirectory() as folder:
        for number, stream in enumerate(shifted(PICTURES, "msh")):
            Path(folder, f"{number:02d}.msh").write_bytes(stream)
        variables = {
            "LOAD_HOSTS": hosts, "LOAD_UPGRADES": "01"[upgrades], "LOAD_STREAMS": folder,
        }  # fmt: skip
        command = [str(LOCUST), "-f", str(Path(__file__).with_name("locustfile.py")), "--headless"]
        command += ["-u", str(USERS), "-r", str(USERS), "-t", f"{seconds:.0f}s", "--only-summary"]
        command += ["--stop-timeout", "60", "--csv", f"{folder}/out"]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        rows = {row["Name"]: row for row in csv.DictReader(Path(folder, "out_stats.csv").open())}
    if done.returncode or int(rows["Aggregated"]["Failure Count"]):
        raise RuntimeError(f"locust: {done.stderr[-3000:]}")
    return rows


def measure(folder: Path, workers: int, apis: int, seconds: float) -> dict[str, Any]:
    """Measure users of instant pictures, then users of upgrades."""
    threads = max((os.cpu_count() or 1) // workers, 1)
    with rig(folder, AFTERIMAGE_THREADS=str(threads)) as made, services(made, apis) as started:
        for _ in range(workers):
            made.worker().ready()
        idle = [machine.resident_mb(s.process.pid) for s in started]
        locust(started, False, 3)  # warms up
        instant = locust(started, False, seconds)["instant"]
        locust(started, True, 3)
        queue, cache = made.store.queue, made.store.cache
        before = queue.info("memory")["used_memory"], cache.info("memory")["used_memory"]
        done, began = pictures(made), time.monotonic()
        locust(started, True, seconds)
        spent, drawn = time.monotonic() - began, pictures(made) - done
        after = queue.info("memory")["used_memory"], cache.info("memory")["used_memory"]
        return {
            "workers": workers,
            "threads": threads,
            "apis": apis,
            **_instant(instant),
            "upgrades_min": 60 * drawn / spent,
            "kb_a_job": (after[0] - before[0]) / drawn / 1e3,
            "kb_a_picture": (after[1] - before[1]) / drawn / 1e3,
            "api_mb": max(idle),
            "api_busy_mb": max(machine.resident_mb(s.process.pid) for s in started),
            "worker_mb": max(machine.resident_mb(w.process.pid) for w in made.workers),
        }


def beside_batch(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Measure users alone, then beside a batch from and to an S3 server; two workers."""
    with contextlib.ExitStack() as stack:
        stores = s3_settings(folder, stack.enter_context(s3_server(folder / "s3")))
        made = stack.enter_context(
            rig(folder / "rig", forked=False, AFTERIMAGE_THREADS="1", **stores)
        )
        started = stack.enter_context(services(made, 1, **stores))
        for _ in range(2):
            made.worker().ready()
        stack.enter_context(mock.patch.dict(os.environ, stores))
        object_stores.connect(WorkerSettings()).write(
            Reference("s3", "in.msh"), BITSTREAM.read_bytes(), "application/octet-stream", {}
        )
        locust(started, True, 3)  # warms up
        alone = _users(made, started, seconds)
        items = [
            {"source": "store:s3/in.msh", "target": f"store:s3/out/{n}.png", "seed": 10**6 + n}
            for n in range(ITEMS)
        ]
        client = started[0].client
        answer = client.post("/v1/batches", json={"items": items, "tier": "perceptual"}, timeout=60)
        answer.raise_for_status()
        beside = _users(made, started, seconds)
        client.delete(answer.headers["location"]).raise_for_status()
        return [{"users": "alone", **alone}, {"users": "beside the batch", **beside}]


def _users(made: Rig, started: list[Service], seconds: float) -> dict[str, float]:
    """Measure instant pictures and upgrades, and the pictures of a batch meanwhile."""

    def written() -> int:
        return int(made.store.queue.hget(made.store.key("metrics"), "targets:written") or 0)

    before, began = written(), time.monotonic()
    instant = _instant(locust(started, False, seconds)["instant"])
    upgrade = locust(started, True, seconds)["upgrade"]
    spent = time.monotonic() - began
    return instant | {
        "upgrades_min": 60 * float(upgrade["Requests/s"]),
        "upgrade_p50_s": float(upgrade["50%"]) / 1e3,
        "upgrade_p99_s": float(upgrade["99%"]) / 1e3,
        "items_min": 60 * (written() - before) / spent,
    }


def _instant(row: dict[str, str]) -> dict[str, float]:
    rate, p50, p99 = (float(row[name]) for name in ("Requests/s", "50%", "99%"))
    return {"instant_s": rate, "p50_ms": p50, "p99_ms": p99}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    seconds = parser.parse_args().seconds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for apis in (1, 2):
            for workers in (1, 2, 4):
                rows.append(measure(Path(folder) / f"{apis}-{workers}", workers, apis, seconds))
                print(rows[-1], flush=True)  # noqa: T201
        batch = beside_batch(Path(folder) / "batch", seconds)
    about = machine.describe()
    text = [
        f"# Under load, {USERS} users, {PHOTO}, `perceptual`\n",
        ", ".join(f"{k} {v}" for k, v in about.items()) + "; everything on one machine\n",
        *_table(LOAD_COLUMNS, rows),
        f"\n## Beside a batch of {ITEMS:,} pictures\n",
        "Two workers, one API process; the batch reads from and writes to a local S3 server. Users "
        "of instant pictures and of upgrades are measured one after the other.\n",
        *_table(BATCH_COLUMNS, batch),
    ]
    document = {"machine": about, "rows": rows, "beside_batch": batch}
    machine.write("load", document, "\n".join(text) + "\n")
    return 0


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> list[str]:
    def cell(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:.4g}"

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell(row[n]) for n in columns) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
