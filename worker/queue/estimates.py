"""What pictures cost the workers that there are, and how long jobs will take by that.

A job's seconds are fitted as a + b · megapixel-steps, by least squares with older jobs fading. The
variance is taken to grow with the size w, so that a job's weight is 1/w: then the fit's sum over
the jobs is what they took together, which is what those who wait want to know. (Weights 1/s² would
follow the fast jobs: with times that scatter by a third, sums came out a fifth too small.)

Each worker keeps its sums in the hash `sums`, with the time of its last job; `workers` is a sorted
set of those that live: name -> when it was last heard of. Times are by the server's clock.
"""

import heapq
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from worker.queue.jobs import LEASE_S, Jobs
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S

NAME = f"{socket.gethostname()}-{os.getpid()}"
"""This process, among workers."""
REMEMBERED = 16
"""Workers that are gone whose sums are kept, for when none is there."""
FADE = 0.9
"""What a measurement still counts for once another has followed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a picture on one worker."""

    job_s: float
    megapixel_step_s: float

    def seconds(self, megapixel_steps: float) -> float:
        """How long a job of this size runs."""
        return self.job_s + self.megapixel_step_s * megapixel_steps


@dataclass(frozen=True, slots=True)
class Sums:
    """Of jobs with seconds s and size w, each weighted by 1/w: of 1, w, w², s and ws."""

    one: float = 0.0
    w: float = 0.0
    ww: float = 0.0
    s: float = 0.0
    ws: float = 0.0

    @classmethod
    def of(cls, seconds: float, w: float) -> "Sums":
        """One job, of w > 0 megapixel-steps."""
        return cls(1 / w, 1.0, w, seconds / w, seconds)

    @property
    def values(self) -> tuple[float, ...]:
        return self.one, self.w, self.ww, self.s, self.ws

    def plus(self, other: "Sums", fade: float = 1.0) -> "Sums":
        """Both together, these faded."""
        pairs = zip(self.values, other.values, strict=True)
        return Sums(*(fade * mine + theirs for mine, theirs in pairs))

    def fit(self) -> Cost | None:
        """None where nothing was measured; a share of each job is fixed only where sizes differ."""
        if not self.ww:
            return None
        spread = self.one * self.ww - self.w**2
        if spread > 1e-3 * self.one * self.ww:
            each = (self.one * self.ws - self.w * self.s) / spread
            fixed = (self.s - each * self.w) / self.one
            if each > 0 and fixed > 0:
                return Cost(fixed, each)
        return Cost(0.0, self.ws / self.ww)


def present(jobs: Jobs) -> None:
    """This worker lives."""
    now = jobs.now()
    with jobs.store.queue.pipeline() as pipe:
        pipe.zadd(_workers(jobs), {NAME: now})
        pipe.zremrangebyscore(_workers(jobs), 0, now - RECORD_TTL_S)
        pipe.expire(_workers(jobs), RECORD_TTL_S)
        pipe.execute()


def absent(jobs: Jobs) -> None:
    """This worker leaves."""
    jobs.store.queue.zrem(_workers(jobs), NAME)


def alive(jobs: Jobs) -> list[bytes]:
    """Names of the workers that were heard of within a lease."""
    since = jobs.now() - LEASE_S
    found: list[bytes] = jobs.store.queue.zrangebyscore(_workers(jobs), since, "+inf")  # type: ignore[assignment]
    return found


def measured(jobs: Jobs, seconds: float, megapixel_steps: float, name: str = NAME) -> None:
    """A worker drew a picture."""
    queue, key = jobs.store.queue, _costs(jobs)
    known: dict[bytes, bytes] = queue.hgetall(key)  # type: ignore[assignment]
    before = known.pop(name.encode(), None)
    sums = (_read(before)[0] if before else Sums()).plus(Sums.of(seconds, megapixel_steps), FADE)
    gone = sorted(set(known) - set(alive(jobs)), key=lambda one: _read(known[one])[1])
    with queue.pipeline() as pipe:
        if len(gone) > REMEMBERED:
            pipe.hdel(key, *gone[:-REMEMBERED])
        pipe.hset(key, name, json.dumps((*sums.values, jobs.now())))
        pipe.expire(key, RECORD_TTL_S)
        pipe.execute()


def model(jobs: Jobs) -> Cost | None:
    """What a picture costs a worker of those that live, else of all that were; None until one was
    measured."""
    known: dict[bytes, bytes] = jobs.store.queue.hgetall(_costs(jobs))  # type: ignore[assignment]
    used = [known[name] for name in alive(jobs) if name in known] or list(known.values())
    total = Sums()
    for values in used:
        total = total.plus(_read(values)[0])
    return total.fit()


def _read(values: bytes) -> tuple[Sums, float]:
    """A worker's sums, and the time of its last job."""
    *sums, when = json.loads(values)
    return Sums(*sums), when


def eta_s(jobs: Jobs, state: JobState) -> float | None:
    """Seconds until a job's end; None where it has ended, or no job was measured yet."""
    cost = model(jobs)
    if cost is None or state.status not in {"queued", "running"}:
        return None
    own = cost.seconds(state.decode.work)
    if state.status == "running":
        return _busy_s(jobs, cost).get(state.owner) or own * (1 - state.step / max(state.total, 1))
    ahead = jobs.queue.job_ids[: jobs.position(state.id) or 0]
    return _free_in_s(jobs, cost, ahead) + own


def backlog_s(jobs: Jobs) -> float:
    """Seconds until a new job would be begun; 0 while no cost is known."""
    cost = model(jobs)
    return 0.0 if cost is None else _free_in_s(jobs, cost, jobs.queue.job_ids)


def _free_in_s(jobs: Jobs, cost: Cost, ahead: Iterable[str]) -> float:
    """When the first worker is free that has begun all of these jobs, and what runs now."""
    workers = len(alive(jobs)) or 1
    busy = sorted(_busy_s(jobs, cost).values(), reverse=True)[:workers]
    free = busy + [0.0] * (workers - len(busy))
    heapq.heapify(free)
    for seconds in _left_s(jobs, cost, jobs.subscribed(ahead)):
        heapq.heapreplace(free, free[0] + seconds)
    return free[0]


def _busy_s(jobs: Jobs, cost: Cost) -> dict[str, float]:
    """Owner of attempts -> what is left to do of all that it draws together."""
    running = jobs.running
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for job_id in running:
            pipe.hget(jobs.key(job_id), "owner")
        owners = [(value or b"").decode() for value in pipe.execute()]
    out: dict[str, float] = {}
    for owner, seconds in zip(owners, _left_s(jobs, cost, running), strict=True):
        out[owner] = out.get(owner, 0.0) + seconds
    return out


def _left_s(jobs: Jobs, cost: Cost, job_ids: Iterable[str]) -> list[float]:
    """What is left to do of these jobs."""
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hmget(jobs.key(job_id), "work", "step", "total")
        rows = [[float(value or 0) for value in row] for row in pipe.execute()]
    return [cost.seconds(work) * (1 - step / max(total, 1)) for work, step, total in rows]


def _workers(jobs: Jobs) -> str:
    return jobs.store.key("workers")


def _costs(jobs: Jobs) -> str:
    return jobs.store.key("sums")
