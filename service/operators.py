"""What operators see of the queue, and what they may do with other callers' jobs and with workers."""

import time

from service import queue_schemas as schemas
from service.problems import Conflict, JobNotFound, WorkerNotFound
from service.services import Services
from worker.queue import counters, estimates, workers
from worker.queue.records import ENDED, JobState

MAX_CALLERS = 100
"""Largest number of waiting callers in the view."""


def view(services: Services) -> schemas.Queue:
    """Everything that waits and runs now."""
    jobs, now = services.jobs, services.jobs.now()
    depths = sorted(jobs.line.depths().items(), key=lambda entry: -entry[1])
    states = [state for job_id in jobs.running if (state := jobs.record(job_id))]
    return schemas.Queue(
        interactive=sum(count for w, count in depths if w.priority == "interactive"),
        batch=sum(count for w, count in depths if w.priority == "batch"),
        waiting=[
            schemas.WaitingCaller(
                priority=w.priority, caller=w.caller, jobs=count,
                unserved_s=round(max(now - w.since, 0.0), 1) if w.since else 0.0,
            )
            for w, count in depths[:MAX_CALLERS]
        ],
        running=[
            schemas.RunningJob.of(state, estimates.eta_s(jobs, state))
            for state in states
            if state.status == "running"
        ],
        workers=_workers(services, now),
        quarantined=[
            schemas.QuarantinedBitstream.of(digest, until)
            for digest, until in jobs.quarantine.all().items()
        ],
    )  # fmt: skip


def _workers(services: Services, now: float) -> list[schemas.QueueWorker]:
    measured = counters.read(services.store).model_time

    def rate(name: str) -> float | None:
        seconds, steps = measured.get(name, (0.0, 0.0))
        return round(steps / seconds, 3) if seconds else None

    return [
        schemas.QueueWorker(
            name=w.name, device=w.device, age_s=round(max(now - w.started, 0.0), 1),
            megapixel_steps_per_s=rate(w.name), drained=w.drained,
        )
        for w in workers.live(services.jobs)
    ]  # fmt: skip


def cancel(services: Services, job_id: str) -> JobState:
    """Cancel a job for all its callers: a queued one at once, a running one at its next step.

    Returns its state. Raises `JobNotFound`, `Conflict` if it has ended.
    """
    state = _record(services, job_id)
    if state.status in ENDED:
        raise Conflict(f"decode {job_id} has already ended: {state.status}")
    services.store.queue.delete(services.jobs.subscribers(job_id))
    services.jobs.withdraw(job_id, state.caller)
    return _record(services, job_id)


def retry(services: Services, job_id: str) -> JobState:
    """Queue a job again for its caller if it failed, was canceled, or its picture has expired.

    Raises `JobNotFound`, `Conflict`, `Quarantined`.
    """
    state = _record(services, job_id)
    if state.status not in {"failed", "canceled", "expired"}:
        reason = "only a failed, canceled or expired decode can be retried"
        raise Conflict(f"decode {job_id} is {state.status}; {reason}")
    data = services.store.bitstream(state.decode.digest)
    if data is None:
        raise JobNotFound(
            f"the bitstream of decode {job_id} has expired; its caller must submit it again"
        )
    state, _ = services.jobs.submit(
        state.decode, data, state.caller, priority=state.priority, weight=state.weight
    )
    return state


def release(services: Services, digest: str) -> schemas.QuarantinedBitstream:
    """Accept a quarantined bitstream again. Raises `Conflict` if it is not quarantined."""
    if not services.jobs.quarantine.release(digest):
        raise Conflict(f"the bitstream {digest} is not quarantined")
    return schemas.QuarantinedBitstream.of(digest, time.time())


def drain(services: Services, name: str) -> schemas.QueueWorker:
    """Let a worker finish its job and take no other. Raises `WorkerNotFound`."""
    if not workers.drain(services.jobs, name):
        raise WorkerNotFound(f"there is no live worker {name}; `afterimage queue` lists them")
    found = [w for w in _workers(services, services.jobs.now()) if w.name == name]
    return found[0]


def _record(services: Services, job_id: str) -> JobState:
    state = services.jobs.get(job_id)
    if state is None:
        raise JobNotFound(f"there is no decode {job_id}: it was never submitted, or has expired")
    return state
