"""Waiting lines: thread pools with a fair order, and limits of time, megapixels and memory."""

import asyncio
import contextvars
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio

from models import cancellation
from models.errors import Canceled
from service import metrics
from service.pixel_budget import PixelBudget
from service.problems import Busy, DeadlineExceeded

T = TypeVar("T")

SMALL = 2.2
"""Megapixels of the largest small picture: 1920×1080, as coded. Small pictures pass larger ones."""
LARGE_NICE = 5
"""Niceness of the threads for large pictures: small ones get three quarters of a shared core."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of work. A megapixel takes about `effort` times as long as with the usual kind."""

    name: str = ""
    effort: float = 1.0


USUAL = Kind()


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


@dataclass(eq=False, slots=True)
class _Call:
    """A call of `Line.run`; `start` is its place in virtual time, which counts `size`."""

    caller: str
    megapixels: float
    kind: Kind
    late: str
    turn: asyncio.Future[None]  # done when the call may begin, or is refused
    start: float = 0.0
    canceled: threading.Event = field(default_factory=threading.Event)
    running: bool = False
    future: Future[Any] | None = None

    @property
    def size(self) -> float:
        """Megapixels of the usual kind that take as long."""
        return self.megapixels * self.kind.effort

    @property
    def large(self) -> bool:
        return self.size > SMALL

    @property
    def flow(self) -> tuple[str, bool]:
        """Calls of one flow run in the order of their arrival; flows share the line equally."""
        return self.caller, self.large


class Line:
    """Threads that callers share by the size of their work (start-time fair queueing).

    At most `threads` calls run at a time, and at most `max(threads - 1, 1)` large ones. If all that
    run are large, one small call may run beside them, even if all threads are in use. Up to
    `waiting` more calls wait, or fewer if they would wait longer than their timeout. `megapixel_s`
    is a guess of how long a megapixel of the usual kind takes, until it has been measured for the
    kind. A call's timeout includes its work if `timeout_includes_work`.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        waiting: int,
        budget: PixelBudget,
        megapixel_s: float,
        timeout_includes_work: bool = True,
    ) -> None:
        self.name = name
        self._threads = {False: threads, True: max(threads - 1, 1)}  # for small and large pictures
        self._pools = {
            False: ThreadPoolExecutor(self._threads[False], name),
            True: ThreadPoolExecutor(self._threads[True], f"{name}-large", _lower_priority),
        }
        self._guess = megapixel_s
        self._megapixel_s: dict[tuple[str, bool], float] = {}  # moving averages
        self._limit = waiting
        self._budget = budget
        budget.on_release.append(self.dispatch)
        self._timeout_includes_work = timeout_includes_work
        self._calls: list[_Call] = []  # that wait or run
        self._clock = 0.0  # virtual time: the start of the last call that began
        self._ends: dict[tuple[str, bool], float] = {}  # where the last call of each flow ends

    async def run(
        self,
        work: Callable[[Deadline], T],
        timeout_s: float,
        late: str,
        megapixels: float = 0.0,
        caller: str = "",
        kind: Kind = USUAL,
    ) -> T:
        """Return the result of `work`, run in a thread; it may move the deadline that it is given.

        Raises `Busy` if the line is too long or the work has not begun after `timeout_s`,
        `DeadlineExceeded` with the text `late` if it has not ended by then. After that, or when
        this call is canceled, work that waits never begins, and `cancellation.check` ends work that
        runs; its thread is in use until it returns.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = _Call(caller, megapixels, kind, late, turn)
        self._enter(call, timeout_s)
        try:
            with anyio.move_on_after(timeout_s) as scope:
                await call.turn
                deadline = Deadline(scope, late)
                return await asyncio.wrap_future(self._submit(call, work, deadline))
            if call.future is None:
                raise self._busy(late, call.large)
            metrics.shed("timeout")
            raise DeadlineExceeded(deadline.late)
        finally:
            call.canceled.set()
            if call.future is None:
                self._leave(call)

    def close(self) -> None:
        """Drop the calls that wait, and cancel those that run."""
        for call in list(self._calls):
            call.canceled.set()
            with suppress(RuntimeError):  # the event loop is closed
                call.turn.get_loop().call_soon_threadsafe(call.turn.cancel)
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def dispatch(self) -> None:
        """Begin the calls whose turn it is."""
        blocked = False  # a large call waits: other large ones must not pass it
        for call in sorted(self._waiting(), key=lambda c: (c.start, c.size)):
            if call.large and (blocked or not self._budget.fits(call.megapixels)):
                blocked = True
            elif self._has_thread(call.large):
                self._clock = max(self._clock, call.start)
                self._budget.take(call.megapixels)
                call.running = True
                call.turn.set_result(None)
            else:
                blocked = blocked or call.large
        self._ends = {flow: end for flow, end in self._ends.items() if end > self._clock}

    def _has_thread(self, large: bool) -> bool:
        """Whether a thread is free for one more call. One small call runs beside all large ones."""
        running = [call.large for call in self._calls if call.running]
        if running.count(large) >= self._threads[large]:
            return False
        return len(running) < self._threads[False] or (not large and all(running))

    def _waiting(self) -> list[_Call]:
        return [call for call in self._calls if not call.running and not call.turn.done()]

    def _enter(self, call: _Call, timeout_s: float) -> None:
        """Add a call to the line; if the line is too long then, refuse calls."""
        call.start = max(self._clock, self._ends.get(call.flow, 0.0))
        self._ends[call.flow] = call.start + call.size
        self._calls.append(call)
        self.dispatch()
        while not call.turn.done() and self._is_too_long(call.large, timeout_s):
            self._refuse_one(call.large, timeout_s)

    def _is_too_long(self, large: bool, timeout_s: float) -> bool:
        waiting = self._waiting()
        calls = [call for call in waiting if call.large == large]
        if not self._timeout_includes_work:
            calls.pop()
        return len(waiting) > self._limit or self._seconds(calls, large) > timeout_s

    def _refuse_one(self, large: bool, timeout_s: float) -> None:
        """Refuse the last call of the flow that has the most work in the line."""
        waiting = self._waiting()
        if len(waiting) <= self._limit:
            waiting = [call for call in waiting if call.large == large]
        sizes: dict[tuple[str, bool], float] = defaultdict(float)
        for call in waiting:
            sizes[call.flow] += call.size
        longest = max(sizes, key=sizes.__getitem__)
        last = [call for call in waiting if call.flow == longest][-1]
        self._leave(last)
        message = f"{len(waiting)} requests already wait for {self.name} threads; try again later"
        if self._timeout_includes_work and self.seconds(last.megapixels, last.kind) > timeout_s:
            message = last.late  # it takes longer than that even alone
        last.turn.set_exception(self._busy(message, last.large))

    def seconds(self, megapixels: float, kind: Kind) -> float:
        """How long work on so many megapixels should take."""
        large = megapixels * kind.effort > SMALL
        return megapixels * self._megapixel_s.get((kind.name, large), self._guess * kind.effort)

    def _seconds(self, calls: Iterable[_Call], large: bool) -> float:
        """How long these calls should take, in threads for large pictures or not."""
        return sum(self.seconds(c.megapixels, c.kind) for c in calls) / self._threads[large]

    def _busy(self, message: str, large: bool) -> Busy:
        """A refusal; `Retry-After` is the time that the calls in the line should take."""
        metrics.shed("line")
        ahead = [call for call in self._calls if call.large == large]
        seconds = max(math.ceil(self._seconds(ahead, large)), 1)
        return Busy(message, {"Retry-After": str(seconds)})

    def _leave(self, call: _Call) -> None:
        """Forget a call that waits no longer or has ended."""
        if call not in self._calls:
            return
        self._calls.remove(call)
        if not call.running and call.flow in self._ends:
            self._ends[call.flow] -= call.size
        self._budget.release(call.megapixels if call.running else 0.0)

    def _submit(self, call: _Call, work: Callable[[Deadline], T], deadline: Deadline) -> Future[T]:
        """Begin a call in a thread; when the thread is free again, the next call begins."""
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._leave, call)

        context = contextvars.copy_context()
        pool = self._pools[call.large]
        call.future = future = pool.submit(context.run, self._timed, call, work, deadline)
        future.add_done_callback(ended)
        return future

    def _timed(self, call: _Call, work: Callable[[Deadline], T], deadline: Deadline) -> T:
        began = time.perf_counter()
        try:
            with cancellation.cancelable(call.canceled):
                result = work(deadline)
        except Canceled as e:  # the future is part of a cycle, and would keep all frames' tensors
            raise e.with_traceback(None) from None
        if call.megapixels:
            before = self.seconds(call.megapixels, call.kind) / call.megapixels
            cost = (time.perf_counter() - began) / call.megapixels
            self._megapixel_s[call.kind.name, call.large] = before + 0.1 * (cost - before)
        return result


def _lower_priority() -> None:
    """Let this thread, and the threads that it starts, compute at `LARGE_NICE`."""
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, nice + LARGE_NICE)
