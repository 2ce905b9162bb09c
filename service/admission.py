"""Whether one more job may be queued."""

import math

from service import metrics
from service.deps import State
from service.problems import Busy, QueueFull
from worker.queue import estimates
from worker.queue.records import ENDED

FULL = 0.8
"""Part of the queue's memory beyond which new jobs are refused: the rest is for those there are."""
FULL_RETRY_S = 600
"""When to come back then: records and bitstreams go as they expire, not as jobs end."""


def admit(own: State, job_id: str) -> None:
    """Raises `QueueFull`, or `Busy` where the queue is longer than the service promises to serve.

    A repeat of what is queued or runs costs nothing.
    """
    state = own.jobs.get(job_id)
    if state is not None and state.status not in ENDED:
        return
    room(own)
    backlog, limit = estimates.backlog_s(own.jobs), own.settings.max_backlog_s
    if backlog > limit:
        metrics.shed("backlog")
        retry = {"Retry-After": str(math.ceil(backlog - limit))}
        raise Busy(f"{backlog:.0f} s of work are queued", retry)


def room(own: State) -> None:
    """Raises `QueueFull` where little of the queue's memory is left."""
    fullness = own.store.fullness()
    if fullness >= FULL:
        metrics.shed("memory")
        retry = {"Retry-After": str(FULL_RETRY_S)}
        raise QueueFull(f"{fullness:.0%} of the queue's memory", retry)
