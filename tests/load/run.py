"""A local service under load: `make load`.

For 1, 2 and 4 workers and 1 and 2 API processes on this machine: instant pictures a second with
their p50 and p99, upgrades a minute, what a job and a picture take of Redis' memory, and the
processes' resident memory. locust sends, from a process of its own, to loopback addresses only.
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

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.support.rig import Rig, rig
from tests.support.service import Service, run_service

LOCUST = Path(__file__).parents[2] / ".venv/load/bin/locust"
USERS = 8
PHOTO = "768×512"


def pictures(own: Rig) -> int:
    return sum(1 for _ in own.store.cache.scan_iter(own.store.key("picture", "*")))


@contextlib.contextmanager
def services(own: Rig, count: int) -> Iterator[list[Service]]:
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(count):
            folder = own.folder / f"api-{number}"
            folder.mkdir(exist_ok=True)
            settings = {"AFTERIMAGE_INSTANT_CACHE_BYTES": "0", "AFTERIMAGE_MAX_BACKLOG_S": "10000"}
            options = ("--workers", "0")
            made.append(stack.enter_context(run_service(folder, *options, **own.urls, **settings)))
        yield made


def locust(hosts: list[str], upgrades: bool, seconds: float) -> dict[str, dict[str, str]]:
    """Rows of its table by name. Raises `RuntimeError` where a request failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(LOCUST), "-f", str(Path(__file__).with_name("locustfile.py")), "--headless"]
        command += ["-u", str(USERS), "-r", str(USERS), "-t", f"{seconds:.0f}s", "--only-summary"]
        command += ["--stop-timeout", "60", "--csv", f"{folder}/out"]
        own = {"LOAD_HOSTS": " ".join(hosts), "LOAD_UPGRADES": "01"[upgrades]}
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        rows = {row["Name"]: row for row in csv.DictReader(Path(folder, "out_stats.csv").open())}
    if done.returncode or int(rows["Aggregated"]["Failure Count"]):
        raise RuntimeError(f"locust: {done.stderr[-3000:]}")
    return rows


def measure(folder: Path, workers: int, apis: int, seconds: float) -> dict[str, Any]:
    threads = max((os.cpu_count() or 1) // workers, 1)
    with rig(folder, AFTERIMAGE_THREADS=str(threads)) as own, services(own, apis) as started:
        for _ in range(workers):
            own.worker().ready()
        hosts = [str(s.client.base_url).rstrip("/") for s in started]
        idle = [machine.resident_mb(s.process.pid) for s in started]
        locust(hosts, False, 3)  # warms up
        instant = locust(hosts, False, seconds)["instant"]
        locust(hosts, True, 3)
        queue, cache = own.store.queue, own.store.cache
        before = queue.info("memory")["used_memory"], cache.info("memory")["used_memory"]
        done, began = pictures(own), time.monotonic()
        locust(hosts, True, seconds)
        spent, drawn = time.monotonic() - began, pictures(own) - done
        after = queue.info("memory")["used_memory"], cache.info("memory")["used_memory"]
        return {
            "workers": workers,
            "threads": threads,
            "apis": apis,
            "instant_s": float(instant["Requests/s"]),
            "p50_ms": float(instant["50%"]),
            "p99_ms": float(instant["99%"]),
            "upgrades_min": 60 * drawn / spent,
            "kb_a_job": (after[0] - before[0]) / drawn / 1e3,
            "kb_a_picture": (after[1] - before[1]) / drawn / 1e3,
            "api_mb": max(idle),
            "api_busy_mb": max(machine.resident_mb(s.process.pid) for s in started),
            "worker_mb": max(machine.resident_mb(w.process.pid) for w in own.workers),
        }


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
    about = machine.describe()
    told = ", ".join(f"{k} {v}" for k, v in about.items())
    names = {
        "workers": "workers", "threads": "threads each", "apis": "API processes",
        "instant_s": "instant pictures/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms",
        "upgrades_min": "upgrades/min", "kb_a_job": "queue kB a job",
        "kb_a_picture": "cache kB a picture", "api_mb": "API MB, idle", "api_busy_mb": "busy",
        "worker_mb": "worker MB",
    }  # fmt: skip
    table = ["| " + " | ".join(names.values()) + " |", "|" + "---|" * len(names)]
    table += ["| " + " | ".join(f"{row[n]:.4g}" for n in names) + " |" for row in rows]
    text = "\n".join(
        [
            f"# Under load, {USERS} users, {PHOTO}, `perceptual`\n",
            f"{told}; everything on one machine\n",
        ]
        + table
    )
    machine.write("load", {"machine": about, "rows": rows}, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
