"""Picture files are read in child processes: a hostile file cannot stop the process that serves.

A reader is a warm child process that needs Pillow and numpy alone. It has a limit of memory, and
each file has limits of CPU time and of elapsed time. A reader that exceeds one of them is killed;
the next file gets a new reader.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import NoReturn

import numpy as np

from models import errors, image
from models.errors import AfterimageError, PictureError
from models.image import Pixels

MEMORY_BYTES = 3 * 2**30
"""Address space of a reader. The largest pictures that are allowed need a fifth of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture file may use."""

    max_pixels: int
    cpu_s: float
    elapsed_s: float


class PictureTooExpensive(PictureError):
    """Reading the picture takes more time or memory than the limit."""

    kind = "picture-error"


@dataclass(slots=True)
class _Reader:
    process: subprocess.Popen[bytes]
    connection: "Connection[bytes, bytes]"

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class PictureReaders:
    """A fixed number of readers, started when they are first needed. Safe to use from threads."""

    def __init__(self, count: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self.memory_bytes = memory_bytes
        self._idle: queue.LifoQueue[_Reader | None] = queue.LifoQueue()
        self._closed = threading.Event()
        self._busy: set[int] = set()  # process ids
        self._lock = threading.Lock()
        for _ in range(count):
            self._idle.put(None)

    def start(self) -> None:
        """Start one reader now, so that the first file does not wait for it."""
        self._idle.put(self._idle.get() or self._start())

    def read(self, data: bytes, limits: Limits) -> Pixels:
        """`image.read` in a reader: a picture file -> (H, W, 3) uint8. Waits for a free reader.

        Raises what `image.read` raises, and `PictureTooExpensive`.
        """
        reader = self._idle.get()
        try:
            reader = reader or self._start()
            pixels = self._ask(reader, data, limits)
        except (OSError, EOFError, PictureTooExpensive) as e:
            if reader is not None:
                reader.close()
                reader = None
            if isinstance(e, PictureTooExpensive):
                raise
            raise PictureTooExpensive(
                f"reading the picture takes more than {limits.cpu_s:g} s of CPU time or "
                f"{self.memory_bytes / 2**30:g} GiB of memory"
            ) from e
        finally:
            self._idle.put(reader)
        return pixels

    def close(self) -> None:
        """Kill all readers; what is being read ends with an error."""
        self._closed.set()
        with self._lock, contextlib.suppress(ProcessLookupError):
            for pid in self._busy:
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(queue.Empty):
            while True:
                if (reader := self._idle.get_nowait()) is not None:
                    reader.close()

    def _ask(self, reader: _Reader, data: bytes, limits: Limits) -> Pixels:
        with self._watched(reader, limits.elapsed_s) as expired:
            try:
                reader.connection.send_bytes(
                    _pack(max_pixels=limits.max_pixels, cpu_s=limits.cpu_s)
                )
                reader.connection.send_bytes(data)
                answer = json.loads(reader.connection.recv_bytes())
                if "shape" in answer:
                    flat = np.frombuffer(reader.connection.recv_bytes(), np.uint8)
                    return flat.reshape(answer["shape"])
            except (OSError, EOFError):
                if not expired.is_set():
                    raise
                raise PictureTooExpensive(
                    f"reading the picture takes longer than {limits.elapsed_s:g} s"
                ) from None
        raise _error(answer)

    @contextlib.contextmanager
    def _watched(self, reader: _Reader, seconds: float) -> Iterator[threading.Event]:
        """Kill the reader after `seconds`; the event says whether that happened."""
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            reader.process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        with self._lock:
            self._busy.add(reader.process.pid)
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()
            with self._lock:
                self._busy.discard(reader.process.pid)

    def _start(self) -> _Reader:
        if self._closed.is_set():
            raise PictureError("the service is stopping")
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable, "-P", "-W", "ignore", "-m", __name__,
                    str(theirs.fileno()), str(self.memory_bytes),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff prints its warnings there
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return _Reader(process, ours)


def _pack(**fields: object) -> bytes:
    """A message as JSON. A reader that was taken over must not be able to send a pickle."""
    return json.dumps(fields).encode()


def _error(answer: dict[str, str]) -> AfterimageError:
    found = getattr(errors, answer["error"], PictureError)
    error: AfterimageError = found(answer["text"])
    return error


def serve(connection: "Connection[bytes, bytes]") -> None:
    """Read pictures until the other end is closed."""
    while True:
        try:
            limits = json.loads(connection.recv_bytes())
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        spent = time.process_time()
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent + limits["cpu_s"]) + 1, hard))
        try:
            pixels = np.ascontiguousarray(image.read(data, limits["max_pixels"]))
        except MemoryError:
            os._exit(1)
        except AfterimageError as e:
            connection.send_bytes(_pack(error=type(e).__name__, text=str(e)))
        else:
            connection.send_bytes(_pack(shape=pixels.shape))
            connection.send_bytes(pixels.data.cast("B"))


def main() -> NoReturn:
    """A reader. Arguments: the descriptor of its pipe, and its memory limit in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides
    descriptor, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(Connection(descriptor))
    sys.exit(0)


if __name__ == "__main__":
    main()
