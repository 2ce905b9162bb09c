"""Services that run as processes, as a user starts them."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.forked import Forked, Process, command
from worker.queue.store import Store, connect
from worker.settings import WorkerSettings

WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass(frozen=True)
class Service:
    """A running service and a client for it."""

    client: httpx.Client
    process: Process
    log: Path
    urls: tuple[str, str]  # of its queue and cache

    @contextlib.contextmanager
    def stores(self) -> Iterator[Store]:
        """Connections to its stores."""
        with connected(*self.urls) as store:
            yield store


@contextlib.contextmanager
def connected(queue: str, cache: str) -> Iterator[Store]:
    """Connections to the stores at these URLs."""
    store = connect(WorkerSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache))
    try:
        yield store
    finally:
        store.close()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def children(pid: int) -> list[int]:
    """Process ids of the children that a process's main thread has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_service(
    folder: Path, *options: str, **environment: str
) -> contextlib.AbstractContextManager[Service]:
    """Run the installed `afterimage serve` on a free port until the block ends.

    Its cache folder is `folder`, and so are its private stores' files where `environment` names no
    REDIS_URL. Fails the test if the service is not ready within two minutes.
    """
    return _run(folder, options, environment, forked=False)


def fork_service(
    folder: Path, *options: str, **environment: str
) -> contextlib.AbstractContextManager[Service]:
    """Run `afterimage serve` as `run_service` does, in a forked process, which starts faster."""
    return _run(folder, options, environment, forked=True)


@contextlib.contextmanager
def _run(
    folder: Path, options: tuple[str, ...], environment: dict[str, str], forked: bool
) -> Iterator[Service]:
    port = free_port()
    settings = {"AFTERIMAGE_CACHE_DIR": str(folder), **environment}
    inherited = {k: v for k, v in os.environ.items() if "REDIS_URL" not in k}
    log = folder / "service.log"
    log.write_bytes(b"")
    process = _start(("serve", "--port", str(port), *options), inherited | settings, log, forked)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_until_ready(client, process, log)
            urls = settings.get("REDIS_URL", ""), settings.get("CACHE_REDIS_URL", "")
            yield Service(client, process, log, urls)
    finally:
        process.terminate()
        process.wait(90)


def _start(
    arguments: tuple[str, ...], environment: dict[str, str], log: Path, forked: bool
) -> Process:
    if forked:
        return Forked(functools.partial(command, arguments), environment, log)
    installed = str(Path(sys.executable).with_name("afterimage"))
    with log.open("ab") as out:
        return subprocess.Popen([installed, *arguments], env=environment, stdout=out, stderr=out)


def _wait_until_ready(client: httpx.Client, process: Process, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the service did not start: {log.read_text()}")
        time.sleep(0.1)
