"""The heartbeat thread of a worker, which also recovers the jobs of dead workers."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from models import folders
from worker.attempt import Attempt
from worker.queue import workers
from worker.queue.jobs import HEARTBEAT_S, LEASE_S, Jobs
from worker.queue.store import RedisError
from worker.spool import Spool

log = logging.getLogger(__name__)


class Heartbeat(threading.Thread):
    """Works every `HEARTBEAT_S` seconds.

    It renews this worker's leases, puts the jobs of dead workers back into the queue, and commits
    spooled pictures. It sends no heartbeat once the main thread has missed its deadline: that
    thread then hangs where no signal reaches it, e.g. in a call of a GPU driver, and other workers
    must take its job.
    """

    def __init__(self, jobs: Jobs, spool: Spool, folder: Path, device: str = "") -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.jobs, self.spool, self.device = jobs, spool, device
        self.file = folder / workers.WORKER_NAME
        """Touched with each heartbeat, even if Redis is down: a liveness file for health checks."""
        self.attempts: Sequence[Attempt] = ()
        """The attempts whose leases are renewed."""
        self.deadline = math.inf
        """Time by which the main thread must have drawn its batch, by `time.monotonic()`."""
        self.stopped = threading.Event()
        self._reap_from = time.monotonic() + HEARTBEAT_S + 1
        self._last_beat = math.inf  # on the clock of the Redis server
        self._missing: set[str] = set()

    def run(self) -> None:
        """Send heartbeats until `stopped` is set."""
        while True:
            if time.monotonic() < self.deadline:
                self._guarded(self._touch_file)
                self._guarded(self._beat)
            self._guarded(self._commit_spooled)
            if self.stopped.wait(HEARTBEAT_S):
                break
        self._guarded(lambda: workers.mark_stopped(self.jobs))
        self._guarded(self.file.unlink)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Log any error and continue: without this thread the worker would lose every job."""
        try:
            action()
        except RedisError as e:
            log.warning("heartbeat: Redis failed: %s", e)
        except Exception:
            log.exception("heartbeat: unexpected error; the next heartbeat tries again")

    def _touch_file(self) -> None:
        folders.private(self.file.parent)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        try:
            for attempt in self.attempts:
                attempt.renew_lease()
            workers.mark_alive(self.jobs, self.device)
            now = self.jobs.now()
        except RedisError:
            self._pause_reaping()  # other workers cannot send heartbeats either
            raise
        if now - self._last_beat > LEASE_S:  # all workers were suspended, or the clock was set
            self._pause_reaping()
        self._last_beat = now
        if time.monotonic() > self._reap_from:
            self.jobs.reap()
        self._requeue_missing()

    def _pause_reaping(self) -> None:
        """Let other workers send a heartbeat first, before any of them is treated as dead."""
        self._reap_from = time.monotonic() + LEASE_S

    def _requeue_missing(self) -> None:
        """Put back jobs that were missing from the queue at two consecutive heartbeats.

        A job that a worker has just taken is missing only for a moment.
        """
        missing = self.jobs.missing()
        self.jobs.requeue(missing & self._missing)
        self._missing = missing - self._missing

    def _commit_spooled(self) -> None:
        self.spool.commit_all(self.jobs, {attempt.id for attempt in self.attempts})
