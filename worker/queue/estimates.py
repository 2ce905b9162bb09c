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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from worker.queue import order, workers
from worker.queue.jobs import LEASE_S, Jobs
from worker.queue.order import NOWHERE, Place
from worker.queue.order_scripts import OUTLOOK
from worker.queue.records import ENDED, DecodeRequest, JobState, Priority
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
    return outlook(jobs).cost


def _fit(sums: Mapping[bytes, bytes], live: Iterable[bytes]) -> CostModel | None:
    """The cost model of these sums."""
    known = [sums[name] for name in live if name in sums]
    total = RegressionSums()
    for value in known or sums.values():
        total = total.plus(_parse(value)[0])
    return total.fit()


def _parse(value: bytes) -> tuple[RegressionSums, float]:
    """A worker's sums, and the time of its last job."""
    *sums, time = json.loads(value)
    return RegressionSums(*sums), time


@dataclass(frozen=True, slots=True)
class Outlook:
    """What determines when a job is drawn, at one time. Seconds need a `cost` model."""

    cost: CostModel | None
    ahead: Sequence[tuple[str, float | None]] | None
    """The jobs before it, and their megapixel-steps unless nobody waits for them; None if it does
    not wait."""
    workers: Mapping[bytes, bool]
    """Live worker -> whether it is drained."""
    running: Sequence[tuple[bytes, bytes, float, float]]
    """Owner, worker, megapixel-steps and done part of each running job."""

    @property
    def position(self) -> int | None:
        """Number of jobs before it; None if it does not wait."""
        return None if self.ahead is None else len(self.ahead)

    def wait_s(self, cost: CostModel) -> float:
        """Seconds until a worker is free after the running jobs and those ahead.

        Drained workers do not count.
        """
        drained = {name for name, is_drained in self.workers.items() if is_drained}
        count = len(self.workers) - len(drained) or 1
        busy = sorted(self.by_owner(cost, drained).values(), reverse=True)[:count]
        free_in = busy + [0.0] * (count - len(busy))
        heapq.heapify(free_in)
        for _, work in self.ahead or ():
            if work is not None:
                heapq.heapreplace(free_in, free_in[0] + cost.seconds(work))
        return free_in[0]

    def by_owner(self, cost: CostModel, without: Container[bytes] = ()) -> dict[bytes, float]:
        """Owner -> remaining seconds of the running jobs that it draws as one batch.

        `without` are names of workers whose jobs are left out.
        """
        totals: dict[bytes, float] = {}
        for owner, worker, work, done in self.running:
            if worker not in without:
                totals[owner] = totals.get(owner, 0.0) + cost.seconds(work) * (1 - done)
        return totals

    def eta_s(self, state: JobState) -> float | None:
        """Seconds until the job is done; None for an ended job or while there is no cost model."""
        if self.cost is None or state.status not in {"queued", "running"}:
            return None
        if state.status == "queued":
            return self.new_eta_s(state.decode)
        batch_s = self.by_owner(self.cost).get(state.owner.encode())
        duration = self.cost.seconds(state.decode.work)
        return batch_s or duration * (1 - state.step / max(state.total, 1))

    def new_eta_s(self, decode: DecodeRequest) -> float | None:
        """Seconds until the job of a decode at this place is done; None without a cost model."""
        if self.cost is None:
            return None
        return self.wait_s(self.cost) + self.cost.seconds(decode.work)


def outlook(jobs: Jobs, place: Place = NOWHERE) -> Outlook:
    """The outlook of a job, or of a job that would be queued now. One round trip to Redis."""
    records = workers.key(jobs, "")
    arguments = _sums_key(jobs), jobs.leases, records, LEASE_S, workers.names_key(jobs)
    ahead, sums, live, running = order.run(jobs.line, OUTLOOK, place, *arguments)
    drained = {name: bool(flag) for name, flag in live}
    return Outlook(
        _fit(dict(zip(sums[::2], sums[1::2], strict=True)), drained),
        None if ahead is None else list(order.parse(ahead)),
        drained,
        [
            (owner or b"", name or b"", float(work or 0), int(step or 0) / int(total or 1))
            for owner, name, work, step, total in running
        ],
    )


def outlook_of(jobs: Jobs, state: JobState) -> Outlook:
    """The outlook of a job with a record."""
    return outlook(jobs, Place.of(state) if state.status == "queued" else NOWHERE)


def eta_s(jobs: Jobs, state: JobState) -> float | None:
    """Seconds until the job is done; None for an ended job or while there is no cost model."""
    return outlook_of(jobs, state).eta_s(state) if state.status not in ENDED else None


def backlog_s(jobs: Jobs, caller: str = "", priority: Priority = "interactive") -> float:
    """Seconds until a worker would begin a new job of the caller; 0 without a cost model."""
    seen = outlook(jobs, Place("", priority, caller))
    return 0.0 if seen.cost is None else seen.wait_s(seen.cost)


def _sums_key(jobs: Jobs) -> str:
    return jobs.store.key("sums")
