"""A worker's attempt at a job, under a lease.

An attempt takes the job's lease and a fencing number, which is higher than those of all earlier
attempts. If a worker sends no heartbeat for `LEASE_S` seconds, its lease ends and another worker
begins a new attempt. Redis then refuses all writes that carry the older fencing number, so exactly
one attempt stores its picture.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from redis.client import Pipeline

from models.errors import AfterimageError
from worker.queue import counters, estimates, events, workers
from worker.queue.jobs import Jobs
from worker.queue.records import JobState, Status
from worker.queue.store import RECORD_TTL_S, RedisError

_UNFINISHED: tuple[Status, ...] = ("queued", "running")
_POLL = """
if redis.call('hget', KEYS[1], 'fence') ~= ARGV[1] then return false end
if redis.call('hget', KEYS[1], 'status') ~= 'running' then return false end
if ARGV[2] ~= '' then
  redis.call('hset', KEYS[1], 'step', ARGV[2])
  redis.call('expire', KEYS[1], ARGV[3])
end
local now = redis.call('time')[1]
return {redis.call('zcount', KEYS[2], now, '+inf'), redis.call('exists', KEYS[3])}
"""
_RENEW = """
if redis.call('hget', KEYS[1], 'fence') == ARGV[1] then
  local time = redis.call('time')
  redis.call('zadd', KEYS[2], 'XX', time[1] + time[2] / 1e6, ARGV[2])
end
"""


class LeaseLost(AfterimageError):
    """This attempt may not write: another one began, the job has ended, or its record expired."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Whether clients still want a running job."""

    subscribed: bool  # False: no client waits for the picture, so the worker should stop
    watched: bool  # True: a client reads the event stream, so previews are useful


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt of this worker at one job."""

    jobs: Jobs
    state: JobState  # at the beginning of the attempt

    @classmethod
    def begin(cls, jobs: Jobs, job_id: str, owner: str = "") -> "Attempt | None":
        """Begin an attempt at a queued job; None if the job is not queued any more.

        `owner` identifies a batch: a worker gives the same value to all jobs of one batch.
        """
        owner = owner or uuid.uuid4().hex
        started: list[JobState] = []

        def start(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                raise LeaseLost(f"job {job_id} is not queued")
            fields = {
                "status": "running", "started": time.time(), "step": 0, "owner": owner,
                "attempts": state.attempts + 1, "fence": state.fence + 1,
                "worker": workers.WORKER_NAME,
            }  # fmt: skip
            pipe.hset(jobs.key(job_id), mapping=fields)  # type: ignore[arg-type]
            pipe.srem(jobs.waiting, job_id)
            pipe.zadd(jobs.leases, {job_id: now})
            pipe.expire(jobs.leases, RECORD_TTL_S)
            events.append(jobs.store, pipe, job_id, "started")
            started.append(replace(state, **fields))  # type: ignore[arg-type]

        now = jobs.now()
        try:
            while not jobs.change(job_id, jobs.subscribers(job_id), start):
                pass
        except LeaseLost:  # or an earlier try succeeded, and only its reply was lost
            return cls.find(jobs, job_id, owner)
        return cls(jobs, started[-1])

    @classmethod
    def find(cls, jobs: Jobs, job_id: str, owner: str) -> "Attempt | None":
        """The running attempt that `owner` began; None if there is none."""
        state = jobs.record(job_id)
        if state is None or (state.status, state.owner) != ("running", owner):
            return None
        return cls(jobs, state)

    @property
    def id(self) -> str:
        """The job's id."""
        return self.state.id

    def renew_lease(self) -> None:
        """Extend the lease (send a heartbeat); no effect if the lease is lost."""
        keys = self.jobs.key(self.id), self.jobs.leases
        self.jobs.store.queue.eval(_RENEW, 2, *keys, self.state.fence, self.id)

    def poll(self, step: int | None = None) -> Demand:
        """Report that `step` is done, if given; return the demand. Raises `LeaseLost`."""
        jobs, total = self.jobs, self.state.total
        keys = jobs.key(self.id), jobs.subscribers(self.id), jobs.store.key("watched", self.id)
        values = self.state.fence, "" if step is None else step, RECORD_TTL_S
        reply = jobs.store.queue.eval(_POLL, 3, *keys, *values)
        if reply is None:
            raise LeaseLost(f"job {self.id} was given to another worker")
        if step is not None and events.is_reported(step, total):
            with jobs.store.queue.pipeline() as pipe:
                events.append(jobs.store, pipe, self.id, "progress", step=step, total=total)
                pipe.execute()
        subscribers, watched = cast(list[int], reply)
        return Demand(bool(subscribers), bool(watched))

    def save_preview(self, step: int, picture: bytes) -> None:
        """Store a preview (a picture file), and announce it in the event stream."""
        self.jobs.store.put_preview(self.id, picture)
        with self.jobs.store.queue.pipeline() as pipe:
            data = {"step": step, "total": self.state.total}
            events.append(self.jobs.store, pipe, self.id, "preview", **data)
            pipe.execute()

    def commit(self, png: bytes) -> None:
        """Store the picture and mark the job as succeeded, even if it was queued again meanwhile.

        The picture is stored under a key of this attempt. The transaction in the queue decides
        which attempt commits, and its record names that attempt by its fence; only this picture is
        published. If this process dies in between, the first reader publishes it (`Store.picture`,
        `Jobs.get`). The pictures of other attempts expire unseen.

        Raises `LeaseLost` if another attempt has begun. After a `RedisError` it may be repeated.
        """

        def succeed(job_id: str, state: JobState, pipe: Pipeline) -> None:
            if state.status == "queued":  # a running job's hash is deleted by RQ itself
                self.jobs.line.queue_of(state).discard(job_id, pipe)
            pipe.hincrby(self.jobs.key(job_id), "commits", 1)
            self.jobs.finish(pipe, state, "succeeded")
            self.jobs.quarantine.reset(state.decode.digest, pipe)

        store, fence = self.jobs.store, self.state.fence
        self._write(lambda *_: None, _UNFINISHED)
        store.put_picture(self.id, fence, png)  # before events and webhooks announce it
        try:
            self._write(succeed, _UNFINISHED)
        except LeaseLost:
            self._discard()
            raise
        with contextlib.suppress(RedisError):  # the job has succeeded: readers publish it later
            if not store.publish(self.id, fence):  # it was evicted already
                store.put_picture(self.id, fence, png)
                store.publish(self.id, fence)
        if store.results is not None:
            on_loss = partial(counters.count, store, counters.RESULTS_LOST)
            store.results.write_later(self.state.decode, png, on_loss)

    def _discard(self) -> None:
        """Delete this attempt's picture, unless an earlier call committed it and lost the reply."""
        with contextlib.suppress(RedisError):  # it expires otherwise
            state = self.jobs.record(self.id)
            if state is None or (state.status, state.fence) != ("succeeded", self.state.fence):
                self.jobs.store.discard(self.id, self.state.fence)

    def record_duration(self, seconds: float) -> None:
        """Record the seconds that the picture took, for predictions and metrics."""
        jobs, work = self.jobs, self.state.decode.work
        estimates.record_duration(jobs, seconds, work)
        counters.add_model_time(jobs.store, workers.WORKER_NAME, seconds, work)
        measured_s = time.time() - self.state.created
        counters.add_eta_ratio(jobs.store, measured_s, self.state.eta_s)

    def fail(self, error: str) -> None:
        """End the job with an error that clients see. Raises `LeaseLost`."""
        self._write(lambda _, state, pipe: self.jobs.finish(pipe, state, "failed", error))

    def cancel(self, put_back: bool = True) -> bool:
        """Cancel the job and return True, unless it has subscribers again. Raises `LeaseLost`.

        If it has subscribers, returns False: the job is queued again, or, without `put_back`, goes
        on running.
        """
        subscribed = False

        def cancel(job_id: str, state: JobState, pipe: Pipeline) -> None:
            nonlocal subscribed
            subscribed = self.jobs.has_subscribers(job_id)
            if not subscribed:
                self.jobs.finish(pipe, state, "canceled")
            elif put_back:
                self.jobs.put_back(state, pipe)

        self._write(cancel)
        return not subscribed

    def put_back(self) -> None:
        """Queue the job again, at the front, without counting this attempt. Raises `LeaseLost`."""
        self._write(lambda _, state, pipe: self.jobs.put_back(state, pipe, state.attempts - 1))

    def record_crash(self) -> None:
        """Count a crash of this worker, which is about to exit. Raises `LeaseLost`."""
        self._write(lambda _, state, pipe: self.jobs.record_crash(state, pipe))

    def _write(
        self,
        change: Callable[[str, JobState, Pipeline], None],
        statuses: Container[Status] = ("running",),
    ) -> None:
        """Run `change` in a transaction if this attempt holds the job and its status is allowed.

        `statuses` are the allowed ones. Raises `LeaseLost` otherwise.
        """

        def fenced(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status not in statuses or state.fence != self.state.fence:
                raise LeaseLost(f"job {job_id} was given to another worker")
            change(job_id, state, pipe)

        while not self.jobs.change(self.id, self.jobs.subscribers(self.id), fenced):
            pass
