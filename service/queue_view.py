"""What operators see of the queue."""

from service import queue_schemas as schemas
from service.services import Services
from worker.queue import counters, estimates, workers

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
        workers=live_workers(services, now),
        quarantined=[
            schemas.QuarantinedBitstream.of(digest, until)
            for digest, until in jobs.quarantine.all().items()
        ],
    )  # fmt: skip


def live_workers(services: Services, now: float) -> list[schemas.QueueWorker]:
    """The live workers, sorted by name; `now` is the time on the clock of Redis."""
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
