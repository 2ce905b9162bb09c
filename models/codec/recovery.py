"""`h_s` under other float arithmetics than this process's own, in a process of its own.

A stream of the `float` profile decodes only where `h_s` rounds as it did for its encoder. How it
rounds follows from settings that are global to a process, so that they are changed in one helper
process alone: started when it is first needed, used by one caller at a time, given a time limit,
gone when it was idle for long or when this process ends.
"""

import atexit
import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import NoReturn

import torch
from torch import Tensor, nn

from models import tiles

ARITHMETICS = ("float64", "one thread", "oneDNN off", "channels_last")
"""In the order in which they are tried. Where two float32 arithmetics put a scale on two sides of
an edge, float64 agrees with either about equally often, whatever the other machine was: of 900
streams made with AVX2, 17 did not decode with AVX-512, and 11 of these did with float64."""
TIMEOUT_S = 60.0
"""For an answer, and for callers ahead: the largest picture takes 2 to 13 s an arithmetic."""
WINDOW = 16**2
"""Positions of z in a window of the float64 `h_s`: 0.1 GB meanwhile, not 2 GB at 20 megapixels."""
OVERLAP = 2
"""Positions of z read beyond what is kept: `h_s` reaches 1 + 1/2 + 1/4."""
IDLE_S = 300.0
"""After which the helper gives its memory back, about 0.7 GB."""


class Unavailable(Exception):
    """The helper is busy for long, took too long or died; it says which."""


def prepare(h_s: nn.Sequential, arithmetic: str) -> nn.Sequential:
    """A copy of `h_s` as `evaluate` wants it; `ValueError` for an unknown arithmetic."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"no arithmetic is called {arithmetic!r}")
    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    layout = torch.channels_last if arithmetic == "channels_last" else torch.contiguous_format
    made: nn.Sequential = copy.deepcopy(h_s).to(dtype).to(memory_format=layout)
    return made


def evaluate(h_s: nn.Sequential, z_hat: Tensor, arithmetic: str) -> tuple[Tensor, Tensor]:
    """`h_s` prepared, `z_hat` (1, N, h, w) -> scales and means, each (1, M, 4h, 4w) float32.

    Changes this process's settings meanwhile.
    """
    if arithmetic == "channels_last":
        z_hat = z_hat.to(memory_format=torch.channels_last)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    if arithmetic == "one thread":
        torch.set_num_threads(1)
    if arithmetic == "oneDNN off":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.inference_mode():
            made = _in_windows(h_s, z_hat) if arithmetic == "float64" else h_s(z_hat).contiguous()
    finally:
        torch.backends.mkldnn.enabled = onednn
        torch.set_num_threads(threads)
    scales_hat, means_hat = made.chunk(2, 1)
    return scales_hat, means_hat


def _in_windows(h_s: nn.Sequential, z_hat: Tensor) -> Tensor:
    """`h_s` in float64 -> (1, 2M, 4h, 4w) rounded to float32, which hides the windows."""
    rows, columns = z_hat.shape[2:]
    out: Tensor | None = None
    for w in tiles.windows(rows, columns, WINDOW, OVERLAP):
        made = h_s(z_hat[w.reads(1)].double())[w.within(4)].float()
        if out is None:
            out = torch.empty(1, made.shape[1], 4 * rows, 4 * columns)
        out[w.writes(4)] = made
    assert out is not None
    return out


@dataclass(frozen=True, slots=True)
class _Running:
    """The process, our end of its pipe, and the keys of the weights that it was sent."""

    process: subprocess.Popen[bytes]
    connection: "Connection[bytes, bytes]"
    known: set[str]


class Helper:
    """The process that evaluates, as its callers see it; safe to use from any thread."""

    def __init__(self, timeout: float = TIMEOUT_S) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._running: _Running | None = None
        os.register_at_fork(after_in_child=self._leave)
        atexit.register(self.close)

    def evaluate(
        self, key: str, h_s: nn.Sequential, z_hat: Tensor, arithmetic: str
    ) -> tuple[Tensor, Tensor]:
        """As the function of this name, for an `h_s` that is not prepared; `key` names its weights.

        Raises `Unavailable`.
        """
        if not self._lock.acquire(timeout=self.timeout):
            raise Unavailable("others are waiting for it")
        try:
            if self._running is not None:
                with contextlib.suppress(OSError, EOFError):  # it may have ended for lack of work
                    return self._ask(self._running, key, h_s, z_hat, arithmetic)
                self.close()
            self._running = _start()
            return self._ask(self._running, key, h_s, z_hat, arithmetic)
        except (OSError, EOFError) as e:
            self.close()
            raise Unavailable("it ended before it answered") from e
        except BaseException:  # as a job's time limit: the answer to come is nobody's
            self.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process, if there is one."""
        running, self._running = self._running, None
        if running is not None:
            running.connection.close()
            running.process.kill()
            running.process.wait()

    @property
    def pid(self) -> int | None:
        """The process, or `None` while there is none."""
        return self._running.process.pid if self._running else None

    def _leave(self) -> None:
        """In a fork: the process is the parent's, and ends when no one else holds its pipe."""
        if self._running is not None:
            self._running.connection.close()
        self._running, self._lock = None, threading.Lock()

    def _ask(
        self, to: _Running, key: str, h_s: nn.Sequential, z_hat: Tensor, arithmetic: str
    ) -> tuple[Tensor, Tensor]:
        net = None if key in to.known else h_s
        began = time.monotonic()
        late = threading.Timer(self.timeout, to.process.kill)  # whatever it, or we, wait for
        late.daemon = True
        late.start()
        try:
            to.connection.send_bytes(pickle.dumps((key, net, z_hat.numpy(), arithmetic)))
            scales_hat, means_hat = pickle.loads(to.connection.recv_bytes())
        except (OSError, EOFError):
            if time.monotonic() - began < self.timeout:
                raise
            raise Unavailable(f"it took longer than {self.timeout:g} s") from None
        finally:
            late.cancel()
        to.known.add(key)
        return torch.from_numpy(scales_hat), torch.from_numpy(means_hat)


def _start() -> _Running:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ours may be the pipe that a picture is written to
        )
    return _Running(process, ours, set())


HELPER = Helper()
"""The one of this process: what arrives from outside can keep one helper busy, not many."""


def serve(connection: "Connection[bytes, bytes]") -> None:
    """Answer until the other end is closed, or nothing was asked for `IDLE_S`."""
    known: dict[str, nn.Sequential] = {}
    with contextlib.suppress(EOFError, OSError):
        while connection.poll(IDLE_S):
            key, h_s, z_hat, arithmetic = pickle.loads(connection.recv_bytes())
            if h_s is not None:
                known[key] = h_s
            prepared = prepare(known[key], arithmetic)
            found = evaluate(prepared, torch.from_numpy(z_hat), arithmetic)
            connection.send_bytes(pickle.dumps(tuple(t.contiguous().numpy() for t in found)))


def main() -> NoReturn:
    """The helper process: the descriptor of its pipe is its argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; our parent's end is ours
    os.nice(10)  # what needs recovery must not slow down what does not
    serve(Connection(int(sys.argv[1])))
    sys.exit(0)


if __name__ == "__main__":
    main()
