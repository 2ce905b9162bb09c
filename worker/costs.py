"""What a megapixel-step costs here, and how long jobs will take by that."""

from rq import Worker

from worker.jobs import Jobs
from worker.records import JobState


def eta_s(jobs: Jobs, state: JobState) -> float | None:
    """Seconds until a job's end; None where it has ended, or no job was measured yet."""
    cost = jobs.cost()
    if cost is None or state.status not in {"queued", "running"}:
        return None
    own = state.decode.work
    if state.status == "running":
        return own * cost * (1 - state.step / max(state.total, 1))
    ahead = jobs.queue.job_ids[: jobs.position(state.id) or 0]
    return (_work(jobs, [*ahead, *jobs.running]) / _workers(jobs) + own) * cost


def backlog_s(jobs: Jobs) -> float:
    """Seconds until everything that waits or runs will be done; 0 while no cost is known."""
    waiting = _work(jobs, [*jobs.queue.job_ids, *jobs.running])
    return waiting * (jobs.cost() or 0.0) / _workers(jobs)


def _work(jobs: Jobs, job_ids: list[str]) -> float:
    """Megapixel-steps of these jobs together; what runs counts whole."""
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hget(jobs.key(job_id), "work")
        return sum(float(work or 0) for work in pipe.execute())


def _workers(jobs: Jobs) -> int:
    return max(Worker.count(connection=jobs.store.queue, queue=jobs.queue), 1)
