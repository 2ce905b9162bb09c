"""Faults that are injected for real: killed workers, API processes and Redis servers."""

import contextlib
import functools
import random
import threading
import time
from collections.abc import Sequence

import httpx

from tests.support.forked import Forked, command
from tests.support.rig import Rig, Worker
from tests.support.service import free_port
from tests.support.waiting import until

KILL_S = (4.0, 14.0)
RESTART_S = (25.0, 60.0)
AWAY_S = (0.5, 3.0)
API_SHARE = 0.3
"""Part of the kills that end an API process, if all of them run."""


class Api:
    """An API process without workers that is killed and started again."""

    def __init__(self, own: Rig, name: str, **settings: str) -> None:
        self.log = own.folder / f"{name}.log"
        port = free_port()
        self.arguments = ("serve", "--port", str(port), "--workers", "0")
        folder = own.folder / name
        folder.mkdir()
        self.environment = own.environment | {"AFTERIMAGE_CACHE_DIR": str(folder)} | settings
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.start()

    def start(self) -> None:
        self.log.touch()
        run = functools.partial(command, self.arguments)
        self.process = Forked(run, self.environment, self.log)

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def ready(self) -> "Api":
        until(lambda: self.is_ready, f"{self.log.stem} starts", 120)
        return self

    def restart(self) -> None:
        """Kill the process, and start it again."""
        self.process.kill()
        self.process.wait()
        self.start()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


class Chaos(threading.Thread):
    """Kills workers, API processes and the queue's server until it is stopped."""

    def __init__(self, own: Rig, seed: int, apis: Sequence[Api] = ()) -> None:
        super().__init__(daemon=True)
        self.own, self.rng, self.apis = own, random.Random(seed), apis
        self.stopped = threading.Event()
        self.kills = self.drains = self.restarts = self.api_kills = 0

    def run(self) -> None:
        restart = time.monotonic() + self.rng.uniform(*RESTART_S)
        while not self.stopped.wait(self.rng.uniform(*KILL_S)):
            if time.monotonic() > restart:
                self.own.restart_queue(self.rng.uniform(*AWAY_S))
                self.restarts += 1
                restart = time.monotonic() + self.rng.uniform(*RESTART_S)
            elif self.rng.random() < API_SHARE and self.apis and all(a.is_ready for a in self.apis):
                self.rng.choice(self.apis).restart()
                self.api_kills += 1
            else:
                self._end_one()

    def _end_one(self) -> None:
        """SIGTERM or SIGKILL a worker; never SIGKILL for the second crash of a bitstream."""
        alive = [w for w in self.own.workers if w.process.poll() is None]
        running = [self.own.jobs.record(name) for name in self.own.jobs.running]
        marked = [s for s in running if s and self.own.jobs.quarantine.count(s.decode.digest)]
        victim: Worker = self.rng.choice(alive)
        if marked or self.rng.random() < 0.25:
            victim.process.terminate()
            self.drains += 1
        else:
            victim.kill()
            self.kills += 1
        self.own.worker()
