"""Read picture files in child processes, so that a hostile file cannot stop the serving process.

A reader is a child process that reads one file at a time and keeps running for the next one. Its
memory is limited, and so are the CPU time and the elapsed time of each file. A reader that exceeds
a limit is killed and replaced.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import NoReturn

import numpy as np
from PIL import AvifImagePlugin, Image

from models import cancellation, errors
from models.errors import AfterimageError, PictureError, PictureTooLarge, Unavailable
from models.pictures import reading
from models.pictures.reading import Picture

CHECK_S = 0.05
"""Seconds between two checks of whether somebody still waits for the picture."""
BASE_BYTES = 2**29
"""Address space of a reader without pictures: 0.1 GB for libraries, the rest for large files."""
BYTES_PER_PIXEL = 64
"""Address space of a reader for each pixel of the largest picture; ordinary ones take up to 25."""
_ENVIRONMENT = {
    # address space would be reserved for each thread
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # bytes: keep the memory of small pictures for the next file; to get pages anew for each file
    # takes the kernel longer than decoding
    "MALLOC_MMAP_THRESHOLD_": str(8 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20),
}
_OUT_OF_MEMORY = 86
"""Exit status of a reader that needs more memory than its limit."""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
"""Signals by which a process ends itself; others come from outside."""
_ADVICE = "save it anew with another program, as a plain PNG or JPEG file"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture file may take."""

    max_pixels: int
    cpu_s: float
    elapsed_s: float


class _Died(Exception):
    """A reader ended, but not because of a limit; the argument is its `Popen.returncode`."""


@dataclass(frozen=True, eq=False, slots=True)
class _Reader:
    """A running child process and the parent's end of its pipe."""

    process: subprocess.Popen[bytes]
    connection: "Connection[bytes, bytes]"

    def read(self, data: bytes, limits: Limits) -> Picture | AfterimageError:
        """Send a file; return its picture, or the error that reading it raised.

        Raises `OSError` or `EOFError` if the reader ends, `ValueError` for a malformed reply,
        `Canceled` if nobody waits for the picture any more.
        """
        self.connection.send_bytes(_pack(max_pixels=limits.max_pixels, cpu_s=limits.cpu_s))
        self.connection.send_bytes(data)
        while not self.connection.poll(CHECK_S):
            cancellation.check()
        reply = json.loads(self.connection.recv_bytes(2**20))
        if "error" in reply:
            return _error(str(reply["error"]), str(reply["text"]), int(reply["pixels"]))
        height, width = int(reply["height"]), int(reply["width"])
        if not 0 < height * width <= limits.max_pixels:
            raise ValueError(f"the reply has {width}×{height} pixels")
        notes = tuple(str(note) for note in reply["notes"])
        samples = np.frombuffer(self.connection.recv_bytes(height * width * 3), np.uint8)
        # a copy, since torch wants to write to it
        return Picture(samples.reshape(height, width, 3).copy(), notes)

    def close(self) -> int:
        """Kill the process unless it has ended; return its exit status as `Popen.returncode`."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


def memory_limit(max_pixels: int) -> int:
    """Bytes of address space that suffice to read pictures of up to `max_pixels`."""
    return BASE_BYTES + BYTES_PER_PIXEL * max_pixels


class _Watchdog:
    """Kills readers at their deadlines.

    It has one thread for all files: to start one for each takes milliseconds on a busy machine.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: dict[_Reader, tuple[float, threading.Event]] = {}
        self._wakes_at = -math.inf  # of time.monotonic(), as are the deadlines
        self._closed = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="picture-watchdog", daemon=True).start()

    def close(self) -> None:
        """End the thread once nothing is watched."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @contextmanager
    def killed_at(
        self, reader: _Reader, deadline: float, expired: threading.Event
    ) -> Iterator[None]:
        """Set `expired` and kill the reader at `deadline`, of `time.monotonic()`.

        Raises `EOFError` if that happened just after the block: the reader is of no use then.
        """
        with self._changed:
            self._watched[reader] = deadline, expired
            if deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(reader, None)
        if expired.is_set():
            raise EOFError

    def _run(self) -> None:
        with self._changed:
            while self._watched or not self._closed:
                now = time.monotonic()
                for reader, (deadline, expired) in list(self._watched.items()):
                    if deadline <= now:
                        expired.set()
                        reader.process.kill()
                        del self._watched[reader]
                deadlines = [deadline for deadline, _ in self._watched.values()]
                self._wakes_at = min(deadlines, default=math.inf)
                self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))


class PictureReaders:
    """As many readers as files are read at a time. Threads may share it.

    `memory_bytes` limits the address space of each reader.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._idle: list[_Reader] = []
        self._busy: set[_Reader] = set()
        self._closed = False
        self._watchdog = _Watchdog()
        self._watchdog.start()

    def start(self) -> None:
        """Start a reader, so that the first file does not wait for it. Raises `Unavailable`."""
        self._give_back(self._take())

    def read(self, data: bytes, limits: Limits) -> Picture:
        """Read a picture file, as `reading.read_with_notes` does, in a reader.

        If the reader dies for a reason other than a limit, another one tries once more. Raises what
        `read_with_notes` raises; `PictureError` if the file needs too much CPU time or memory, or
        crashes both readers; `TimeoutError` after `elapsed_s`; `Unavailable` if the readers are
        closed, cannot be started or are killed from outside; `Canceled`.
        """
        deadline = time.monotonic() + limits.elapsed_s
        with suppress(_Died):
            return self._try(data, limits, deadline)
        try:
            return self._try(data, limits, deadline)
        except _Died as e:
            status = e.args[0]
        if -status in _CRASHES:
            name = signal.Signals(-status).name
            raise PictureError(f"the picture crashes the program that reads it ({name}); {_ADVICE}")
        raise Unavailable(
            f"the process that reads pictures ended twice (status {status}); try again later"
        )

    def close(self) -> None:
        """Kill all readers. Calls of `read` raise `Unavailable`, those that are waiting too."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for reader in self._busy:  # closed by the threads that use them
                reader.process.kill()
        for reader in idle:
            reader.close()
        self._watchdog.close()

    def _try(self, data: bytes, limits: Limits, deadline: float) -> Picture:
        """`read` with one reader. Raises `_Died` too."""
        reader = self._take()
        expired = threading.Event()
        try:
            with self._watchdog.killed_at(reader, deadline, expired):
                found = reader.read(data, limits)
        except BaseException as e:
            with self._lock:
                self._busy.discard(reader)
            status = reader.close()
            if isinstance(e, OSError | EOFError | ValueError | KeyError | TypeError):
                raise self._reason(status, limits, expired.is_set()) from e
            raise
        self._give_back(reader)
        if isinstance(found, AfterimageError):
            raise found
        return found

    def _reason(self, status: int, limits: Limits, expired: bool) -> Exception:
        """Why a reader ended with `status`."""
        if self._closed:
            return Unavailable("the service is stopping; try again later")
        if expired:
            return TimeoutError(f"the picture was not read within {limits.elapsed_s:g} s")
        if status == -signal.SIGPROF:
            return PictureError(
                f"reading the picture takes more than {limits.cpu_s:g} s of CPU time, the limit; "
                f"{_ADVICE}"
            )
        if status == _OUT_OF_MEMORY:
            gib = self.memory_bytes / 2**30
            return PictureError(
                f"reading the picture takes more than {gib:.1f} GiB of memory, the limit; {_ADVICE}"
            )
        return _Died(status)

    def _take(self) -> _Reader:
        """A reader that nobody else uses: an idle one, otherwise a new one."""
        while True:
            with self._lock:
                reader = self._idle.pop() if self._idle and not self._closed else None
            if reader is None:
                reader = _start(self.memory_bytes)
            elif reader.process.poll() is not None:  # killed from outside while it was idle
                reader.close()
                continue
            with self._lock:
                if not self._closed:
                    self._busy.add(reader)
                    return reader
            reader.close()
            raise Unavailable("the service is stopping; try again later")

    def _give_back(self, reader: _Reader) -> None:
        with self._lock:
            self._busy.discard(reader)
            if not self._closed:
                self._idle.append(reader)
                return
        reader.close()


def _start(memory_bytes: int) -> _Reader:
    """Start a reader; it needs 0.3 s until it is ready. Raises `Unavailable`."""
    try:
        ours, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            command = (sys.executable, "-P", "-W", "ignore", "-m", __name__)
            process = subprocess.Popen(
                [*command, str(descriptor), str(memory_bytes)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff prints its warnings there
                env=os.environ | _ENVIRONMENT,
            )
    except OSError as e:
        raise Unavailable(f"no process can be started to read pictures: {e}") from e
    # the first that the kernel kills for memory, from its start: while it imports modules too
    with suppress(OSError), open(f"/proc/{process.pid}/oom_score_adj", "w") as file:
        file.write("1000")
    return _Reader(process, ours)


def _pack(**fields: object) -> bytes:
    """A message as JSON: unlike a pickle, it is harmless from a reader that a file took over."""
    return json.dumps(fields).encode()


def _error(name: str, text: str, pixels: int) -> AfterimageError:
    found = getattr(errors, name, None)
    if not (isinstance(found, type) and issubclass(found, AfterimageError)):
        found = PictureError
    error = found(text)
    if isinstance(error, PictureTooLarge):
        error.pixels = pixels
    return error


def serve(connection: "Connection[bytes, bytes]") -> None:
    """Read pictures until the other end is closed."""
    with suppress(EOFError, OSError):
        while True:
            limits = json.loads(connection.recv_bytes())
            _answer(connection, connection.recv_bytes(), limits["max_pixels"], limits["cpu_s"])


def _answer(
    connection: "Connection[bytes, bytes]", data: bytes, max_pixels: int, cpu_s: float
) -> None:
    """Read a picture file and send its size, notes and pixels, or the error."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process
    try:
        picture = reading.read_with_notes(data, max_pixels)
    except AfterimageError as e:
        if isinstance(e.__cause__, MemoryError):
            raise MemoryError from e
        connection.send_bytes(
            _pack(error=type(e).__name__, text=str(e), pixels=getattr(e, "pixels", 0))
        )
    else:
        pixels = np.ascontiguousarray(picture.pixels)
        height, width = pixels.shape[:2]
        connection.send_bytes(_pack(height=height, width=width, notes=picture.notes))
        connection.send_bytes(pixels.data.cast("B"))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(memory_bytes: int) -> None:
    """Set the limits of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no files
    os.nice(5)  # instant decodes come first


def main() -> NoReturn:
    """Run a reader. Arguments: the file descriptor of its pipe, its memory limit in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default as many as there are cores
    Image.init()  # otherwise the first file waits until all plugins are imported
    _limit(int(sys.argv[2]))
    try:
        serve(Connection(int(sys.argv[1])))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    sys.exit(0)


if __name__ == "__main__":
    main()
