"""The worker's context: what it loads before its first job, and the state of its current job."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from models.library import Library
from worker.attempt import LeaseLost
from worker.drawing import Drawing
from worker.heartbeat import Heartbeat
from worker.queue.jobs import Jobs
from worker.queue.store import RedisError
from worker.spool import Spool

log = logging.getLogger(__name__)

SHUTDOWN_PATIENCE_S = 20.0
"""How long a stopping worker waits for Redis to put its job back."""
RETRY_S = 0.5
"""Pause before another try while a store is down."""


class ShutdownRequested(BaseException):
    """Raised by signal handlers: this process must exit now, and another worker draws its job."""


@dataclass(slots=True)
class WorkerContext:
    """State that the task, RQ's worker and the signal handlers of this process share.

    Signal handlers set plain attributes instead of a `threading.Event`: the interrupted code could
    hold the event's lock, and the handler would then wait for ever.
    """

    jobs: Jobs
    library: Library
    heartbeat: Heartbeat
    spool: Spool
    max_pixels: int
    batch: int = 1  # largest number of pictures drawn together
    grace_s: float = 30.0  # how long a stopping worker may take to finish its job
    drawing: Drawing | None = None
    estimated_s: float | None = None  # duration of the current batch that the cost model predicts
    stopping: bool = False  # True: take no further job
    signaled_at: float | None = None  # time.monotonic() at the first signal to exit
    deferred: list[Callable[[], object]] = field(default_factory=list)
    """Actions to run once RQ has released the current job, which may then be queued again."""
    _interruptible: bool = False

    def remaining_s(self) -> float | None:
        """Seconds until the current batch is done; None if unknown.

        They follow from the pace of the steps done, or else from the cost model.
        """
        by_pace = self.drawing.remaining_s() if self.drawing else None
        return self.estimated_s if by_pace is None else by_pace

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise `ShutdownRequested` in the block; raise it at once if stopping."""
        self._interruptible = True
        try:
            if self.stopping:
                raise ShutdownRequested
            yield
        finally:
            self._interruptible = False

    def interrupt(self, limit_s: float) -> float | None:
        """Called by signal handlers: raise `ShutdownRequested` if an `interruptible` block runs.

        If the batch will be done within `limit_s`, returns the remaining seconds instead. Outside
        of such a block, returns None.
        """
        if not self._interruptible:
            return None
        remaining = self.remaining_s()
        if remaining is None or remaining > limit_s:
            self._interruptible = False  # a second signal must not interrupt the clean-up
            raise ShutdownRequested
        return remaining

    def run_deferred(self) -> None:
        """Run the deferred actions, in order; retry while Redis is down.

        A stopping worker gives up after `SHUTDOWN_PATIENCE_S`. Its leases then expire, and other
        workers take its jobs.
        """
        give_up_at = time.monotonic() + SHUTDOWN_PATIENCE_S
        while self.deferred:
            try:
                self.deferred[0]()
            except LeaseLost:
                pass  # another worker has the job
            except RedisError as e:
                log.warning("Redis failed, so a job cannot be released yet; retrying: %s", e)
                if self.stopping and time.monotonic() > give_up_at:
                    return
                time.sleep(RETRY_S)
                continue
            except Exception:
                log.exception("a job could not be released; it is taken when its lease expires")
            self.deferred.pop(0)


_current: WorkerContext | None = None


def current() -> WorkerContext:
    """Return the context of this process; a global, because RQ passes only the job id to tasks."""
    if _current is None:
        raise RuntimeError("this process is not a worker: call worker.context.install first")
    return _current


def install(context: WorkerContext) -> None:
    """Set the context that `current` returns to tasks in this process."""
    global _current
    _current = context
