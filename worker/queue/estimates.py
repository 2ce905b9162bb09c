"""Predictions of job durations, from the durations of finished jobs.

The cost model is seconds = a + b · w, where w is the job's size in megapixel-steps. It is fitted by
weighted least squares, and older jobs count less. The variance is assumed to be proportional to w,
so each job has the weight 1/w. The predicted total of all jobs then equals their measured total,
which matters most for waiting times. (Weights of 1/seconds² favour fast jobs: where durations
scattered by a third, the predicted totals were a fifth too small.)

The hash `sums` holds each worker's regression sums and the time of its last job, on the Redis
server's clock.
"""

import heapq
import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from worker.queue import order, workers
from worker.queue.jobs import Jobs
from worker.queue.order import Place
from worker.queue.records import JobState, Priority
from worker.queue.store import RECORD_TTL_S
from worker.queue.workers import WORKER_NAME

MAX_DEAD_WORKERS = 16
"""Number of dead workers whose sums are kept, to predict while no worker is alive."""
DECAY = 0.9
"""Factor on the weight of all former jobs with each new one."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Duration of a job: a fixed part and a part proportional to its work."""

    job_s: float
    megapixel_step_s: float

    def seconds(self, megapixel_steps: float) -> float:
        """Predicted duration of a job."""
        return self.job_s + self.megapixel_step_s * megapixel_steps


@dataclass(frozen=True, slots=True)
class RegressionSums:
    """Sums of 1, w, w², s and ws over jobs of s seconds and size w, each weighted by 1/w."""

    one: float = 0.0
    w: float = 0.0
    ww: float = 0.0
    s: float = 0.0
    ws: float = 0.0

    @classmethod
    def of(cls, seconds: float, w: float) -> "RegressionSums":
        """The sums of one job, whose size `w` > 0 is in megapixel-steps."""
        return cls(1 / w, 1.0, w, seconds / w, seconds)

    @property
    def values(self) -> tuple[float, ...]:
        """The five sums as a tuple."""
        return self.one, self.w, self.ww, self.s, self.ws

    def plus(self, other: "RegressionSums", decay: float = 1.0) -> "RegressionSums":
        """decay · self + other."""
        pairs = zip(self.values, other.values, strict=True)
        return RegressionSums(*(decay * mine + theirs for mine, theirs in pairs))

    def fit(self) -> CostModel | None:
        """The least-squares fit; None without jobs.

        The fixed part is 0 unless the jobs' sizes differ and both parts come out positive.
        """
        if not self.ww:
            return None
        spread = self.one * self.ww - self.w**2
        if spread > 1e-3 * self.one * self.ww:
            slope = (self.one * self.ws - self.w * self.s) / spread
            fixed = (self.s - slope * self.w) / self.one
            if slope > 0 and fixed > 0:
                return CostModel(fixed, slope)
        return CostModel(0.0, self.ws / self.ww)


def record_duration(
    jobs: Jobs, seconds: float, megapixel_steps: float, name: str = WORKER_NAME
) -> None:
    """Add a finished job to a worker's sums; drop sums of all but `MAX_DEAD_WORKERS` dead ones."""
    queue, key = jobs.store.queue, _sums_key(jobs)
    stored: dict[bytes, bytes] = queue.hgetall(key)  # type: ignore[assignment]
    former = stored.pop(name.encode(), None)
    sums = _parse(former)[0] if former else RegressionSums()
    sums = sums.plus(RegressionSums.of(seconds, megapixel_steps), DECAY)
    live = {worker.encode() for worker in workers.names(jobs)}
    dead = sorted(set(stored) - live, key=lambda name: _parse(stored[name])[1])
    with queue.pipeline() as pipe:
        if len(dead) > MAX_DEAD_WORKERS:
            pipe.hdel(key, *dead[:-MAX_DEAD_WORKERS])
        pipe.hset(key, name, json.dumps((*sums.values, jobs.now())))
        pipe.expire(key, RECORD_TTL_S)
        pipe.execute()


def cost_model(jobs: Jobs) -> CostModel | None:
    """Fit the cost model to the jobs of the live workers; None until a first job has finished.

    If no live worker has finished a job, the jobs of dead workers are used.
    """
    stored: dict[bytes, bytes] = jobs.store.queue.hgetall(_sums_key(jobs))  # type: ignore[assignment]
    live = [stored[name.encode()] for name in workers.names(jobs) if name.encode() in stored]
    total = RegressionSums()
    for value in live or stored.values():
        total = total.plus(_parse(value)[0])
    return total.fit()


def _parse(value: bytes) -> tuple[RegressionSums, float]:
    """A worker's sums, and the time of its last job."""
    *sums, time = json.loads(value)
    return RegressionSums(*sums), time


def eta_s(jobs: Jobs, state: JobState, ahead: Sequence[str] | None = None) -> float | None:
    """Seconds until the job is done; None for an ended job or while there is no cost model.

    `ahead` is the result of `jobs.ahead(state)`, if the caller has it already.
    """
    cost = cost_model(jobs)
    if cost is None or state.status not in {"queued", "running"}:
        return None
    duration = cost.seconds(state.decode.work)
    if state.status == "running":
        batch_s = _remaining_by_owner(jobs, cost).get(state.owner)
        return batch_s or duration * (1 - state.step / max(state.total, 1))
    ahead = jobs.ahead(state) if ahead is None else ahead
    return _wait_s(jobs, cost, ahead or ()) + duration


def backlog_s(jobs: Jobs, caller: str = "", priority: Priority = "interactive") -> float:
    """Seconds until a worker would begin a new job of the caller; 0 without a cost model."""
    cost = cost_model(jobs)
    if cost is None:
        return 0.0
    return _wait_s(jobs, cost, order.ahead(jobs.line, Place("", priority, caller)) or ())


def _wait_s(jobs: Jobs, cost: CostModel, ahead: Iterable[str]) -> float:
    """Seconds until a worker is free after the running jobs and the queued jobs `ahead`.

    Drained workers do not count.
    """
    live = workers.live(jobs)
    drained = {worker.name for worker in live if worker.drained}
    count = len(live) - len(drained) or 1
    busy = sorted(_remaining_by_owner(jobs, cost, drained).values(), reverse=True)[:count]
    free_in = busy + [0.0] * (count - len(busy))
    heapq.heapify(free_in)
    for seconds in _remaining(jobs, cost, jobs.subscribed(ahead)):
        heapq.heapreplace(free_in, free_in[0] + seconds)
    return free_in[0]


def _remaining_by_owner(
    jobs: Jobs, cost: CostModel, without: Container[str] = ()
) -> dict[str, float]:
    """Owner -> remaining seconds of the running jobs that it draws as one batch.

    `without` are names of workers whose jobs are left out.
    """
    running = jobs.running
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for job_id in running:
            pipe.hmget(jobs.key(job_id), "owner", "worker")
        rows = [[(value or b"").decode() for value in row] for row in pipe.execute()]
    totals: dict[str, float] = {}
    for (owner, worker), seconds in zip(rows, _remaining(jobs, cost, running), strict=True):
        if worker not in without:
            totals[owner] = totals.get(owner, 0.0) + seconds
    return totals


def _remaining(jobs: Jobs, cost: CostModel, job_ids: Iterable[str]) -> list[float]:
    """Remaining seconds of each job, by its work and the steps done."""
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hmget(jobs.key(job_id), "work", "step", "total")
        rows = [[float(value or 0) for value in row] for row in pipe.execute()]
    return [cost.seconds(work) * (1 - step / max(total, 1)) for work, step, total in rows]


def _sums_key(jobs: Jobs) -> str:
    return jobs.store.key("sums")
