"""Admission control: refuses new jobs while the queue is too long or its memory nearly full."""

import math

from service import metrics
from service.problems import Busy, QueueFull
from service.services import Services
from worker.queue import estimates
from worker.queue.records import ENDED, JobState

FULL = 0.8
"""Fraction of the queue's memory above which new jobs are refused; the rest is for jobs that were
accepted before."""
FULL_RETRY_S = 600
"""`Retry-After` in that case: memory is freed as records and bitstreams expire, not as jobs end."""


def admit(services: Services, state: JobState | None) -> None:
    """Raise `QueueFull` or `Busy` unless one more job may be queued.

    A request for a job whose `state` is queued or running is always admitted.
    """
    if state is not None and state.status not in ENDED:
        return
    check_memory(services)
    backlog, limit = estimates.backlog_s(services.jobs), services.settings.max_backlog_s
    if backlog > limit:
        metrics.shed("backlog")
        retry = {"Retry-After": str(math.ceil(backlog - limit))}
        raise Busy(f"{backlog:.0f} s of work are queued; the limit is {limit:.0f} s", retry)


def check_memory(services: Services) -> None:
    """Raise `QueueFull` if the queue's Redis is nearly out of memory."""
    fullness = services.store.fullness()
    if fullness >= FULL:
        metrics.shed("memory")
        retry = {"Retry-After": str(FULL_RETRY_S)}
        raise QueueFull(f"the memory of the queue's Redis is {fullness:.0%} full", retry)
