"""Admission control: refuses new jobs while the queue is too long or its memory nearly full."""

import math

from service import metrics
from service.problems import Busy, QueueFull
from service.services import Services
from worker.queue import estimates
from worker.queue.records import ENDED, JobState, Priority

FULL = 0.8
"""Used fraction of the queue's memory from which on new jobs are refused; jobs that were accepted
need the rest."""
FULL_RETRY_S = 600
"""`Retry-After` of `QueueFull`. It is long: memory is freed when records and bitstreams expire, not
when jobs end."""


def admit(
    services: Services, state: JobState | None, caller: str, priority: Priority = "interactive"
) -> None:
    """Raise `QueueFull` or `Busy` unless one more job of the caller may be queued.

    Only the jobs that workers would take before it count. A request for a job whose `state` is
    queued or running is always admitted.
    """
    if state is not None and state.status not in ENDED:
        return
    check_memory(services)
    backlog = estimates.backlog_s(services.jobs, caller, priority)
    limit = services.settings.max_backlog_s
    if backlog > limit:
        metrics.shed("backlog")
        retry = {"Retry-After": str(math.ceil(backlog - limit))}
        message = (
            f"a new job would wait for {backlog:.0f} s; the limit is {limit:.0f} s; try again later"
        )
        raise Busy(message, retry)


def check_memory(services: Services) -> None:
    """Raise `QueueFull` if the queue's Redis is nearly out of memory."""
    fullness = services.store.fullness()
    if fullness >= FULL:
        metrics.shed("memory")
        retry = {"Retry-After": str(FULL_RETRY_S)}
        message = f"the memory of the queue's Redis is {fullness:.0%} full; try again later"
        raise QueueFull(message, retry)
