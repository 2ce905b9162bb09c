"""What operators may do with the queue, whoever queued a job."""

import time

from service import queue_schemas as schemas
from service import queue_view
from service.problems import Conflict, JobNotFound, WorkerNotFound
from service.services import Services
from worker.queue import workers
from worker.queue.records import ENDED, JobState


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
        raise Conflict(f"decode {job_id} has the status '{state.status}'; {reason}")
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
    found = [w for w in queue_view.live_workers(services, services.jobs.now()) if w.name == name]
    return found[0]


def _record(services: Services, job_id: str) -> JobState:
    state = services.jobs.get(job_id)
    if state is None:
        raise JobNotFound(f"there is no decode {job_id}: it was never submitted, or has expired")
    return state
