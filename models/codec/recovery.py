"""Compute `h_s` with other float roundings, in a child process.

A bitstream of the `float` profile decodes only if the sums in `h_s` are rounded as on the encoder's
machine. Rounding depends on the number format, the memory layout, threads and oneDNN. A combination
of these is called an arithmetic here. Threads and oneDNN are settings of a whole process, so only a
child process changes them. It is started when it is first needed, serves one caller at a time with
a time limit, and ends with its parent or after `IDLE_S` seconds without work.
"""

import atexit
import contextlib
import copy
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import cancellation, tiles
from models.errors import BitstreamError, Unavailable

ARITHMETICS = ("float64", "one thread", "oneDNN off", "channels_last")
"""The arithmetics, in the order in which they are tried. float64 comes first: if two machines round
a scale to different sides of a threshold in the scale table, it agrees with either about equally
often. Of 900 streams made with AVX2, 17 did not decode with AVX-512, and 11 of these decoded with
float64."""
TIMEOUT_S = 60.0
"""Longest wait for a result. The largest picture takes 2 to 13 s per arithmetic."""
BUSY_S = 15.0
"""Longest wait for the process to become free: less than the API's deadline for a picture, so that
the client is told why."""
WINDOW = 16**2
"""Positions of z per window of `h_s` in float64: a window takes 0.1 GB, a whole picture of 20
megapixels 2 GB."""
OVERLAP = 4
"""Margin of a window, in positions of z: the receptive field of `h_s` is 1 + 1/2 + 1/4, and in
cheng2020 1 + 1 + 1/2 + 1/2 + 1/4."""
CHECK_S = 0.1
"""Seconds between two checks of whether the caller still wants the result."""
IDLE_S = 300.0
"""Idle time after which the process ends, to free about 0.7 GB."""


def prepare(h_s: nn.Sequential, arithmetic: str) -> nn.Sequential:
    """Return a copy of `h_s` in the dtype and memory layout that `evaluate` needs.

    Raises `ValueError` for an unknown arithmetic.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"unknown arithmetic {arithmetic!r}; choose one of {ARITHMETICS}")
    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    layout = torch.channels_last if arithmetic == "channels_last" else torch.contiguous_format
    converted: nn.Sequential = copy.deepcopy(h_s).to(dtype).to(memory_format=layout)
    return converted


def evaluate(h_s: nn.Sequential, z_hat: Tensor, arithmetic: str) -> Tensor:
    """Compute the result of `h_s`, (1, C, 4h, 4w) float32, from z_hat (1, N, h, w).

    `h_s` comes from `prepare`. Settings that are global to the process change during the call.
    """
    if arithmetic == "channels_last":
        z_hat = z_hat.to(memory_format=torch.channels_last)
    with settings(arithmetic):
        return _in_windows(h_s, z_hat) if arithmetic == "float64" else h_s(z_hat).contiguous()


@contextlib.contextmanager
def settings(arithmetic: str) -> Iterator[None]:
    """Change the settings of the process to those of an arithmetic, without gradients."""
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    if arithmetic == "one thread":
        torch.set_num_threads(1)
    if arithmetic == "oneDNN off":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mkldnn.enabled = onednn
        torch.set_num_threads(threads)


def _in_windows(h_s: nn.Sequential, z_hat: Tensor) -> Tensor:
    """Run `h_s` in float64 windows; return (1, C, 4h, 4w) in float32.

    Rounding to float32 removes the tiny differences at the windows' borders.
    """
    rows, columns = z_hat.shape[2:]
    out: Tensor | None = None
    for w in tiles.windows(rows, columns, WINDOW, OVERLAP):
        part = h_s(z_hat[w.reads(1)].double())[w.within(4)].float()
        if out is None:
            out = torch.empty(1, part.shape[1], 4 * rows, 4 * columns)
        out[w.writes(4)] = part
    assert out is not None
    return out


@dataclass(frozen=True, slots=True)
class _Child:
    """A running child process, our end of its pipe, and the keys of the weights that it holds."""

    process: subprocess.Popen[bytes]
    connection: "Connection[bytes, bytes]"
    known: set[str]


class RecoveryProcess:
    """Client of the child process. Threads may share it; their calls wait for each other."""

    def __init__(self, timeout: float = TIMEOUT_S, busy_timeout: float = BUSY_S) -> None:
        self.timeout = timeout
        self.busy_timeout = busy_timeout
        self._lock = threading.Lock()
        self._child: _Child | None = None
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def evaluate(self, key: str, h_s: nn.Sequential, z_hat: Tensor, arithmetic: str) -> Tensor:
        """Call `evaluate` in the child process; otherwise as `call`.

        `h_s` is the network as it is, without `prepare`.
        """
        task = functools.partial(_evaluate, h_s)
        out: Tensor = torch.from_numpy(self.call(key, task, arithmetic, z_hat.numpy()))
        return out

    def call(self, key: str, task: Callable[..., Any], arithmetic: str, *inputs: object) -> Any:
        """Call `task(arithmetic, *inputs)` in the child process, which is started if there is none.

        `key` identifies the task with its weights, which is sent once per child process. Raises the
        task's `BitstreamError`, `Canceled`, or `Unavailable` if the process is busy, takes too long
        or dies; the message says which.
        """
        reply = self._ask(key, task, (arithmetic, *inputs))
        if isinstance(reply, BitstreamError):
            raise reply
        return reply

    def _ask(self, key: str, task: Callable[..., Any], inputs: tuple[object, ...]) -> Any:
        self._acquire()
        try:
            if self._child is not None:
                with contextlib.suppress(OSError, EOFError):  # it may have ended after `IDLE_S`
                    return self._request(self._child, key, task, inputs)
                self.close()
            self._child = _start()
            return self._request(self._child, key, task, inputs)
        except (OSError, EOFError) as e:
            self.close()
            raise _unavailable("ended before it replied") from e
        except BaseException:  # e.g. a job's time limit: the late reply must not be read by others
            self.close()
            raise
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        """Take the lock. Raises `Unavailable` after `busy_timeout`, `Canceled`."""
        deadline = time.monotonic() + self.busy_timeout
        while not self._lock.acquire(timeout=min(self.busy_timeout, CHECK_S)):
            cancellation.check()
            if time.monotonic() >= deadline:
                raise _unavailable(f"was busy for {self.busy_timeout:g} s")

    def close(self) -> None:
        """Kill the child process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.connection.close()
            child.process.kill()
            child.process.wait()

    @property
    def pid(self) -> int | None:
        """Process id of the child process; None if there is none."""
        return self._child.process.pid if self._child else None

    def _forget(self) -> None:
        """Called in a forked process: forget the child process and the lock, which the parent uses.

        The inherited copy of the pipe is closed: the child process ends only when all copies are.
        """
        if self._child is not None:
            self._child.connection.close()
        self._child, self._lock = None, threading.Lock()

    def _request(
        self, child: _Child, key: str, task: Callable[..., Any], inputs: tuple[object, ...]
    ) -> Any:
        sent = None if key in child.known else task
        began = time.monotonic()
        timer = threading.Timer(self.timeout, child.process.kill)  # unblocks both send and receive
        timer.daemon = True
        timer.start()
        try:
            child.connection.send_bytes(pickle.dumps((key, sent, inputs)))
            while not child.connection.poll(CHECK_S):
                cancellation.check()
            reply = pickle.loads(child.connection.recv_bytes())
        except (OSError, EOFError):
            if time.monotonic() - began < self.timeout:
                raise
            raise _unavailable(f"took longer than {self.timeout:g} s") from None
        finally:
            timer.cancel()
        child.known.add(key)
        return reply


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(
        "the bitstream does not decode with this machine's arithmetic, and the process that tries "
        f"others {reason}; try again later"
    )


def _start() -> _Child:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the parent's stdout may be where a picture is written
        )
    return _Child(process, ours, set())


PROCESS = RecoveryProcess()
"""The only instance per process: however many bitstreams need recovery, one child process runs."""


def serve(connection: "Connection[bytes, bytes]") -> None:
    """Reply to requests until the pipe is closed or no request has come for `IDLE_S`."""
    known: dict[str, Callable[..., Any]] = {}
    with contextlib.suppress(EOFError, OSError):
        while connection.poll(IDLE_S):
            key, task, inputs = pickle.loads(connection.recv_bytes())
            if task is not None:
                known[key] = task
            try:
                reply = known[key](*inputs)
            except BitstreamError as e:
                reply = e
            connection.send_bytes(pickle.dumps(reply))


def _evaluate(h_s: nn.Sequential, arithmetic: str, z_hat: NDArray[np.float32]) -> object:
    return evaluate(prepare(h_s, arithmetic), torch.from_numpy(z_hat), arithmetic).numpy()


def main() -> NoReturn:
    """Run the child process. Its argument is the file descriptor of its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end is this one's
    os.nice(10)  # recovery must not slow down bitstreams that need none
    serve(Connection(int(sys.argv[1])))
    sys.exit(0)


if __name__ == "__main__":
    main()
