"""A worker's hold on a job: what it writes is written only while the hold lasts.

An attempt takes the job's lease and a number, the fence, that rises with every attempt. Who fell
silent for `LEASE_S` loses the job to another attempt with a higher fence; what it still writes then
is refused: exactly one attempt commits.
"""

import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import cast

from redis.client import Pipeline
from rq.job import Job

from models.errors import AfterimageError
from worker.queue import counters, estimates, events
from worker.queue.jobs import Jobs
from worker.queue.records import JobState, Status
from worker.queue.store import RECORD_TTL_S

Change = Callable[[str, JobState, Pipeline], None]

_UNFINISHED: tuple[Status, ...] = ("queued", "running")
_LOOK = """
if redis.call('hget', KEYS[1], 'fence') ~= ARGV[1] then return false end
if redis.call('hget', KEYS[1], 'status') ~= 'running' then return false end
if ARGV[2] ~= '' then
  redis.call('hset', KEYS[1], 'step', ARGV[2])
  redis.call('expire', KEYS[1], ARGV[3])
end
local now = redis.call('time')[1]
return {redis.call('zcount', KEYS[2], now, '+inf'), redis.call('exists', KEYS[3])}
"""
_BEAT = """
if redis.call('hget', KEYS[1], 'fence') == ARGV[1] then
  local time = redis.call('time')
  redis.call('zadd', KEYS[2], 'XX', time[1] + time[2] / 1e6, ARGV[2])
end
"""


class LeaseLost(AfterimageError):
    """The job belongs to another attempt by now, has ended, or its record is gone."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the outside wants of a running job."""

    wanted: bool  # else it should stop
    watched: bool  # previews are looked at


@dataclass(frozen=True, slots=True)
class Attempt:
    """At one job, by this worker."""

    jobs: Jobs
    state: JobState  # as it began

    @classmethod
    def begin(cls, jobs: Jobs, job_id: str, owner: str = "") -> "Attempt | None":
        """Take a job that waits; None where it does not wait any more.

        `owner` is one for all jobs that this worker draws together.
        """
        owner = owner or uuid.uuid4().hex
        taken: list[JobState] = []

        def take(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                raise LeaseLost(f"job {job_id} does not wait")
            now = {
                "status": "running", "started": time.time(), "step": 0, "owner": owner,
                "attempts": state.attempts + 1, "fence": state.fence + 1,
            }  # fmt: skip
            pipe.hset(jobs.key(job_id), mapping=now)  # type: ignore[arg-type]
            pipe.srem(jobs.waiting, job_id)
            pipe.zadd(jobs.leases, {job_id: began})
            pipe.expire(jobs.leases, RECORD_TTL_S)
            events.tell(jobs.store, pipe, job_id, "started")
            taken.append(replace(state, **now))  # type: ignore[arg-type]

        began = jobs.now()
        try:
            while not jobs.change(job_id, jobs.subscribers(job_id), take):
                pass
        except LeaseLost:  # unless we took it, and the connection broke before we knew
            return cls.held(jobs, job_id, owner)
        return cls(jobs, taken[-1])

    @classmethod
    def held(cls, jobs: Jobs, job_id: str, owner: str) -> "Attempt | None":
        """The attempt that `owner` began, if it still runs."""
        state = jobs.record(job_id)
        if state is None or (state.status, state.owner) != ("running", owner):
            return None
        return cls(jobs, state)

    @property
    def id(self) -> str:
        """The job's."""
        return self.state.id

    def beat(self) -> None:
        """The worker lives: the lease begins anew."""
        keys = self.jobs.key(self.id), self.jobs.leases
        self.jobs.store.queue.eval(_BEAT, 2, *keys, self.state.fence, self.id)

    def look(self, step: int | None = None) -> Wish:
        """What the outside wants now; `step` denoiser steps are done. Raises `LeaseLost`."""
        jobs, total = self.jobs, self.state.total
        keys = jobs.key(self.id), jobs.subscribers(self.id), jobs.store.key("watched", self.id)
        values = self.state.fence, "" if step is None else step, RECORD_TTL_S
        found = jobs.store.queue.eval(_LOOK, 3, *keys, *values)
        if found is None:
            raise LeaseLost(f"job {self.id} was given to another worker")
        if step is not None and events.worth_telling(step, total):
            with jobs.store.queue.pipeline() as pipe:
                events.tell(jobs.store, pipe, self.id, "progress", step=step, total=total)
                pipe.execute()
        interested, watched = cast(list[int], found)
        return Wish(bool(interested), bool(watched))

    def preview(self, step: int, picture: bytes) -> None:
        """Keep the estimate so far, a picture file, and say so."""
        self.jobs.store.put_preview(self.id, picture)
        with self.jobs.store.queue.pipeline() as pipe:
            told = {"step": step, "total": self.state.total}
            events.tell(self.jobs.store, pipe, self.id, "preview", **told)
            pipe.execute()

    def commit(self, png: bytes) -> None:
        """The picture is there; also while the job waits for another attempt that has not begun.

        Raises `LeaseLost`, or `RedisError`: then it may be tried again.
        """

        def end(job_id: str, state: JobState, pipe: Pipeline) -> None:
            if state.status == "queued":  # else RQ itself still needs its note of the job
                pipe.lrem(self.jobs.queue.key, 0, job_id)
                pipe.delete(Job.key_for(job_id))
            pipe.hincrby(self.jobs.key(job_id), "commits", 1)
            self.jobs.finish(pipe, job_id, "succeeded")
            self.jobs.reset_crashes(state.decode.digest, pipe)

        self._write(lambda *_: None, _UNFINISHED)
        self.jobs.store.put_picture(self.id, png)  # before anybody is told of it
        self._write(end, _UNFINISHED)

    def measured(self, seconds: float) -> None:
        """How long the picture took, for predictions and metrics."""
        jobs, work = self.jobs, self.state.decode.work
        estimates.measured(jobs, seconds, work)
        counters.measured(jobs.store, estimates.NAME, seconds, work)
        state = jobs.record(self.id) or self.state  # it may have begun before what was predicted
        counters.predicted(jobs.store, time.time() - state.created, state.eta_s)

    def fail(self, error: str) -> None:
        """It cannot be drawn; `error` is shown to clients. Raises `LeaseLost`."""
        self._write(lambda job_id, _, pipe: self.jobs.finish(pipe, job_id, "failed", error))

    def stop(self, back: bool = True) -> bool:
        """Nobody waits: the end. Who came meanwhile is served after all, by another attempt or, not
        `back`, by this one; then False. Raises `LeaseLost`."""
        wanted = False

        def leave(job_id: str, _: JobState, pipe: Pipeline) -> None:
            nonlocal wanted
            wanted = self.jobs.has_subscribers(job_id)
            if not wanted:
                self.jobs.finish(pipe, job_id, "canceled")
            elif back:
                self.jobs.put_back(job_id, pipe)

        self._write(leave)
        return not wanted

    def put_back(self) -> None:
        """Let another worker draw it, in front, as if this attempt had not been.

        Raises `LeaseLost`.
        """
        self._write(lambda id, state, pipe: self.jobs.put_back(id, pipe, state.attempts - 1))

    def blame(self) -> None:
        """This worker ends over the job: as if it had died. Raises `LeaseLost`."""
        self._write(lambda _, state, pipe: self.jobs.record_crash(state, pipe))

    def _write(self, change: Change, statuses: Container[Status] = ("running",)) -> None:
        def held(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status not in statuses or state.fence != self.state.fence:
                raise LeaseLost(f"job {job_id} was given to another worker")
            change(job_id, state, pipe)

        while not self.jobs.change(self.id, self.jobs.subscribers(self.id), held):
            pass
