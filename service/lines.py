"""Waiting lines: thread pools whose number of waiting calls and whose time are limited."""

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import anyio

from service import metrics
from service.problems import Busy, DeadlineExceeded

T = TypeVar("T")


class Deadline:
    """When a call must be done, and what its caller is told afterwards."""

    def __init__(self, scope: anyio.CancelScope, late: str) -> None:
        self.late = late
        self._scope = scope
        self._loop = asyncio.get_running_loop()

    def move(self, seconds: float, late: str) -> None:
        """Set the deadline to `seconds` from now. The work calls this, in its own thread."""
        self.late = late
        at = self._loop.time() + seconds
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(setattr, self._scope, "deadline", at)


class Line:
    """Threads for one kind of work: at most `threads` calls run at a time, `waiting` more wait."""

    def __init__(self, name: str, threads: int, waiting: int, mean_s: float) -> None:
        self.name = name
        self._pool = ThreadPoolExecutor(threads, name)
        self._threads = threads
        self._limit = waiting
        self._pending = 0  # calls of `run` that wait or are running
        self._mean_s = mean_s  # moving average of a call's duration

    async def run(
        self,
        work: Callable[[Deadline], T],
        timeout_s: float,
        late: str,
        unstarted: type[Busy | DeadlineExceeded] = DeadlineExceeded,
    ) -> T:
        """Return the result of `work`, run in a thread; it may move the deadline that it is given.

        Raises `Busy` if the line is full. After `timeout_s` raises `DeadlineExceeded` with the text
        `late`, or `unstarted` if the work still waits. Work that has started by then keeps its
        thread until it returns; other work never starts.
        """
        waiting = max(self._pending - self._threads, 0)
        if waiting >= self._limit:
            raise self._busy(f"{waiting} requests already wait for {self.name} threads")
        self._pending += 1
        try:
            with anyio.move_on_after(timeout_s) as scope:
                deadline = Deadline(scope, late)
                context = contextvars.copy_context()
                future = self._pool.submit(context.run, self._timed, work, deadline)
                return await asyncio.wrap_future(future)
            if future.cancelled() and unstarted is Busy:
                raise self._busy(deadline.late)
            metrics.shed("timeout")
            raise DeadlineExceeded(deadline.late)
        finally:
            self._pending -= 1

    def _busy(self, message: str) -> Busy:
        """A refusal; its `Retry-After` is the time that the calls which wait should take."""
        metrics.shed("line")
        turns = (max(self._pending - self._threads, 0) + 1) / self._threads
        return Busy(message, {"Retry-After": str(math.ceil(turns * self._mean_s))})

    def close(self) -> None:
        """Drop the calls that wait; those that run go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: Callable[[Deadline], T], deadline: Deadline) -> T:
        began = time.perf_counter()
        try:
            return work(deadline)
        finally:
            self._mean_s += 0.1 * (time.perf_counter() - began - self._mean_s)
