"""The thread that speaks for a worker while its main thread draws, and looks after others' jobs."""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from worker import costs
from worker.attempt import Attempt
from worker.jobs import BEAT_S, LEASE_S, Jobs
from worker.spool import Spool
from worker.store import RedisError

log = logging.getLogger(__name__)


class Keeper(threading.Thread):
    """Renews leases, says that this worker lives, finds what dead workers left."""

    def __init__(self, jobs: Jobs, spool: Spool) -> None:
        super().__init__(name="keeper", daemon=True)
        self.jobs, self.spool = jobs, spool
        self.attempts: Sequence[Attempt] = ()
        self.stopped = threading.Event()
        self._trust_from = time.monotonic() + BEAT_S + 1
        self._nowhere: set[str] = set()

    def run(self) -> None:
        while True:
            try:
                self._beat()
            except RedisError as e:
                log.warning("the queue cannot be used: %s", e)
                # others could not speak up either: their silence means nothing for a while
                self._trust_from = time.monotonic() + LEASE_S
            if self.stopped.wait(BEAT_S):
                break
        with contextlib.suppress(RedisError):
            costs.absent(self.jobs)

    def _beat(self) -> None:
        attempts = self.attempts
        for attempt in attempts:
            attempt.beat()
        costs.present(self.jobs)
        if time.monotonic() > self._trust_from:
            self.jobs.reap()
        self.spool.hand_over(self.jobs, {attempt.id for attempt in attempts})
        # between a worker's taking a job and its saying so the job is nowhere, for an instant:
        # only what is nowhere twice is lost
        found = self.jobs.astray()
        self.jobs.requeue(found & self._nowhere)
        self._nowhere = found - self._nowhere
