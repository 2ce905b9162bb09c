"""The thread that speaks for a worker while its main thread draws, and looks after others' jobs."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from worker.attempt import Attempt
from worker.queue import estimates
from worker.queue.jobs import BEAT_S, LEASE_S, Jobs
from worker.queue.store import RedisError
from worker.spool import Spool

log = logging.getLogger(__name__)


class Keeper(threading.Thread):
    """Renews leases, says that this worker lives, finds what dead workers left."""

    def __init__(self, jobs: Jobs, spool: Spool, alive: Path) -> None:
        super().__init__(name="keeper", daemon=True)
        self.jobs, self.spool = jobs, spool
        self.file = alive / estimates.NAME
        """Touched at each turn, also while Redis is away: for whoever watches the process."""
        self.attempts: Sequence[Attempt] = ()
        self.until = math.inf
        """When drawing has to have ended, by the monotonic clock. What no signal reaches, as a call
        of a driver that never returns, is as good as dead afterwards: its silence says so."""
        self.stopped = threading.Event()
        self._trust_from = time.monotonic() + BEAT_S + 1
        self._last = math.inf  # the server's time at the turn before
        self._nowhere: set[str] = set()

    def run(self) -> None:
        while True:
            if time.monotonic() < self.until:
                self._guarded(self._show)
                self._guarded(self._beat)
            self._guarded(self._look_after)
            if self.stopped.wait(BEAT_S):
                break
        self._guarded(lambda: estimates.absent(self.jobs))
        self._guarded(self.file.unlink)

    def _guarded(self, turn: Callable[[], None]) -> None:
        """Whatever goes wrong: a worker without its keeper would lose every job."""
        try:
            turn()
        except RedisError as e:
            log.warning("a store cannot be used: %s", e)
        except Exception:
            log.exception("the keeper goes on")

    def _show(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()

    def _beat(self) -> None:
        try:
            for attempt in self.attempts:
                attempt.beat()
            estimates.present(self.jobs)
            now = self.jobs.now()
        except RedisError:
            # others could not speak up either: their silence means nothing for a while
            self._trust_from = time.monotonic() + LEASE_S
            raise
        if now - self._last > LEASE_S:  # all slept with this machine, or the server's clock was set
            self._trust_from = time.monotonic() + LEASE_S
        self._last = now
        if time.monotonic() > self._trust_from:
            self.jobs.reap()
        # between a worker's taking a job and its saying so the job is nowhere, for an instant:
        # only what is nowhere twice is lost
        found = self.jobs.missing()
        self.jobs.requeue(found & self._nowhere)
        self._nowhere = found - self._nowhere

    def _look_after(self) -> None:
        self.spool.hand_over(self.jobs, {attempt.id for attempt in self.attempts})
