"""Redis servers and worker processes that tests kill, stop and start again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import rq

from models.tiers import Settings
from tests.support.forked import Forked, Process, worker_main
from tests.support.jobs import decode_of
from tests.support.waiting import until
from worker.queue import private_redis
from worker.queue.jobs import Jobs
from worker.queue.records import JobState
from worker.queue.store import Store, connect
from worker.settings import WorkerSettings


class Server:
    """A Redis server whose data survive a kill."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.socket = folder, folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.command = [
            str(private_redis.find_server()), "--port", "0", "--unixsocket", str(self.socket),
            "--save", "", "--dir", str(folder), "--logfile", str(folder / "log"), *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        # not `die_with_parent`: the kernel's parent is the thread, which may end earlier
        self.process = subprocess.Popen(self.command)
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            until(client.ping, "the server starts")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Worker:
    """A worker process that logs to the file `log`."""

    def __init__(self, rig: "Rig", name: str) -> None:
        self.log = rig.folder / f"{name}.log"
        self.log.touch()
        self.process = self._start(rig.environment, rig.forked)

    def _start(self, environment: dict[str, str], forked: bool) -> Process:
        if forked:
            return Forked(worker_main, environment, self.log)
        command = [sys.executable, "-P", "-m", "worker.main"]
        with self.log.open("ab") as out:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def ready(self) -> "Worker":
        until(lambda: "ready" in self.log.read_text(), f"{self.log.stem} starts", 180)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, seconds: float = 60) -> int:
        """Send SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


class Rig:
    """Two Redis servers, and the workers that a test starts: as new processes or `forked` ones."""

    def __init__(self, folder: Path, forked: bool, **environment: str) -> None:
        self.folder, self.forked = folder, forked
        self.queue = Server(folder / "queue", private_redis._QUEUE)
        self.cache = Server(folder / "cache", ())
        self.urls = {"REDIS_URL": self.queue.url, "CACHE_REDIS_URL": self.cache.url}
        settings = {"AFTERIMAGE_CACHE_DIR": str(folder / "own"), "AFTERIMAGE_THREADS": "1"}
        self.environment = os.environ | self.urls | settings | environment
        self.store: Store = connect(WorkerSettings(**self.urls))  # type: ignore[arg-type]
        self.jobs = Jobs(self.store)
        self.workers: list[Worker] = []

    def worker(self) -> Worker:
        self.workers.append(Worker(self, f"worker-{len(self.workers)}"))
        return self.workers[-1]

    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.process.poll() is None]

    def one(self) -> Worker:
        """A live worker; if there is none, a new one that is ready."""
        return next(iter(self.alive()), None) or self.worker().ready()

    def drawing(self, job_id: str) -> Worker:
        """The live worker that runs this job."""
        registered = rq.Worker.all(self.store.queue)
        pids = {w.pid for w in registered if w.get_current_job_id() == job_id}
        (worker,) = (worker for worker in self.alive() if worker.process.pid in pids)
        return worker

    def start_queue(self) -> None:
        """Start the killed queue server again, with its data."""
        self.queue.start()
        self.store.queue.connection_pool.disconnect()  # stale connections would fail once each

    def restart_queue(self, away_s: float) -> None:
        """Kill the queue server, and start it again `away_s` later."""
        self.queue.kill()
        time.sleep(away_s)
        self.start_queue()

    def submit(self, data: bytes, settings: Settings, seed: int = 0) -> str:
        return self.jobs.submit(decode_of(data, settings, seed, "test"), data)[0].id

    def state(self, job_id: str) -> JobState:
        state = self.jobs.get(job_id)
        assert state is not None
        return state

    def ended(self, job_id: str, seconds: float = 60) -> JobState:
        until(lambda: self.state(job_id).status not in {"queued", "running"}, "the end", seconds)
        return self.state(job_id)

    def at_step(self, job_id: str, step: int) -> None:
        until(lambda: self.state(job_id).step >= step, f"step {step}")

    def commits(self, job_id: str) -> int:
        return int(self.store.queue.hget(self.jobs.key(job_id), "commits") or 0)


@contextlib.contextmanager
def rig(folder: Path, forked: bool = False, **environment: str) -> Iterator[Rig]:
    made = Rig(folder, forked, **environment)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.kill()
        made.store.close()
        for server in (made.queue, made.cache):
            server.kill()
