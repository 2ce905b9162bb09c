"""The contract between API and workers: what a job is, where it stands, how it is handed over."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from worker import events, figures, logs, tracing, webhooks
from worker.records import Decode, JobState, Status, end, fresh
from worker.store import RECORD_TTL_S, Store

TASK = "worker.tasks.enhance"
"""The one function that workers run."""
LEASE_S = 10
"""How long a silent worker keeps its job; three missed beats."""
BEAT_S = 3
"""How often a worker says that it is alive."""
MAX_ATTEMPTS = 3
"""Attempts after which a job whose workers died is given up: it may be what kills them."""
GIVEN_UP = f"its worker died or was cut off {MAX_ATTEMPTS} times"
FAILED_S = 60
"""How long RQ keeps its own note of a job that raised."""

HOLD_S = 3600
"""How long a submission is interested in its picture, unless it says otherwise."""
MAX_HOLD_S = 24 * 3600
"""How long it may."""
POLL_HOLD_S = 600
"""How long a question about a job renews that interest, at least."""
WEIGHT = 0.2
"""Of the newest measurement in the average cost of a megapixel-step."""
WATCHED_S = 30
"""How long previews are drawn after an event stream was last read."""


NAME = f"{socket.gethostname()}-{os.getpid()}"
"""Of this process, in figures."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the outside wants of a running job."""

    wanted: bool  # else it should stop
    watched: bool  # previews are looked at


def _origin() -> dict[str, str]:
    """The request that queues a job, for the log and the trace of who runs it."""
    traceparent = tracing.inject().get("traceparent", "")
    return {"request_id": logs.request_id.get(), "traceparent": traceparent}


class Jobs:
    """Job records and the RQ queue, over the queue store."""

    def __init__(self, store: Store, timeout_s: int = 3600) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self.queue = Queue(
            f"{store.prefix}-decodes", connection=store.queue, serializer=JSONSerializer
        )

    def submit(
        self, decode: Decode, data: bytes, caller: str = "", hold_s: float = HOLD_S
    ) -> tuple[JobState, bool]:
        """Queue a job unless it is queued, running or done; its state, and whether it is new.

        Record, bitstream, queue entry and the caller's interest, for `hold_s` seconds, are written
        in one transaction, whoever else submits.
        """
        key = self.key(decode.id)
        self.hold(decode.id, caller, hold_s)  # a running job that was to stop goes on
        with self.store.queue.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)  # type: ignore[no-untyped-call]
                    state = self.get(decode.id)
                    if state and state.status in {"queued", "running", "succeeded"}:
                        return state, False
                    pipe.multi()
                    pipe.set(self.store.key("bitstream", decode.digest), data, ex=RECORD_TTL_S)
                    pipe.delete(key)
                    pipe.hset(key, mapping=fresh(decode) | _origin())
                    pipe.expire(key, RECORD_TTL_S)
                    self._enqueue(decode.id, pipe)
                    events.tell(self.store, pipe, decode.id, "queued")
                    pipe.execute()
                except redis.WatchError:
                    continue
                state = self.get(decode.id)
                if state is not None:
                    return state, True

    def get(self, job_id: str) -> JobState | None:
        """The job's state, or None where there is no record; `expired` once its picture is gone."""
        state = self.record(job_id)
        picture = self.store.key("picture", job_id)
        if state and state.status == "succeeded" and not self.store.cache.exists(picture):
            return replace(state, status="expired")
        return state

    def record(self, job_id: str) -> JobState | None:
        """As `get`, whether or not its picture is kept."""
        row: dict[bytes, bytes] = self.store.queue.hgetall(self.key(job_id))  # type: ignore[assignment]
        return JobState.of(job_id, row)

    def hold(self, job_id: str, caller: str, seconds: float) -> None:
        """The caller wants the picture for so long, or for longer if it said so before."""
        key = self._interest(job_id)
        with self.store.queue.pipeline() as pipe:
            pipe.zadd(key, {caller: time.time() + seconds}, gt=True)
            pipe.expire(key, RECORD_TTL_S)
            pipe.execute()

    def renew(self, job_id: str, caller: str, seconds: float) -> None:
        """Who asks is interested still; who has withdrawn is not by asking."""
        key = self._interest(job_id)
        self.store.queue.zadd(key, {caller: time.time() + seconds}, xx=True, gt=True)

    def promise(self, job_id: str, seconds: float) -> None:
        """Remember what was predicted when the job was queued."""
        self.store.queue.hset(self.key(job_id), "eta_s", str(seconds))

    def watch(self, job_id: str) -> None:
        """Somebody reads the job's events: previews are worth drawing for a while."""
        self.store.queue.set(self.store.key("watched", job_id), 1, ex=WATCHED_S)

    def withdraw(self, job_id: str, caller: str) -> bool:
        """The caller no longer wants the picture; whether somebody else does.

        Else a job that waits is canceled, and one that runs will be by its worker.
        """
        self.store.queue.zrem(self._interest(job_id), caller)

        def drop(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state and state.status == "queued":
                pipe.lrem(self.queue.key, 0, job_id)
                self._finish(pipe, job_id, "canceled")

        wanted = self.wanted(job_id)
        while not wanted and not self._change(job_id, self._interest(job_id), drop):
            wanted = self.wanted(job_id)
        return wanted

    def wanted(self, job_id: str) -> bool:
        """Whether anybody waits for the picture."""
        return bool(self.store.queue.zcount(self._interest(job_id), time.time(), "+inf"))

    def position(self, job_id: str) -> int | None:
        """Jobs ahead in the queue, or None where it does not wait there."""
        at: int | None = self.store.queue.lpos(self.queue.key, job_id)  # type: ignore[assignment]
        return at

    def started(self, job_id: str) -> None:
        """A worker begins: counts the attempt and takes the lease."""
        with self.store.queue.pipeline() as pipe:
            now = {"status": "running", "started": str(time.time()), "step": "0"}
            pipe.hset(self.key(job_id), mapping=now)  # type: ignore[arg-type]
            pipe.hincrby(self.key(job_id), "attempts", 1)
            pipe.srem(self._waiting, job_id)
            pipe.zadd(self._leases, {job_id: self._now()})
            pipe.expire(self._leases, RECORD_TTL_S)
            events.tell(self.store, pipe, job_id, "started")
            pipe.execute()

    def beat(self, job_id: str) -> None:
        """The worker of a running job is alive: its lease begins anew."""
        self.store.queue.zadd(self._leases, {job_id: self._now()}, xx=True)

    def reap(self) -> None:
        """Queue again, in front, what silent workers left; give it up after `MAX_ATTEMPTS`."""
        silent = self.store.queue.zrangebyscore(self._leases, 0, self._now() - LEASE_S)

        def leave(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            pipe.zrem(self._leases, job_id)
            if state and state.status == "running":
                if state.attempts < MAX_ATTEMPTS:
                    pipe.hset(self.key(job_id), mapping={"status": "queued", "step": 0})
                    self._enqueue(job_id, pipe, at_front=True)
                    events.tell(self.store, pipe, job_id, "queued", attempts=state.attempts)
                    figures.add(self.store, pipe, figures.LEASES_LOST)
                else:
                    self._finish(pipe, job_id, "failed", GIVEN_UP)

        for job_id in (value.decode() for value in silent):  # type: ignore[union-attr]
            self._change(job_id, self._leases, leave)

    def astray(self) -> set[str]:
        """Jobs that should be in the queue and are not: a worker took them and fell at once."""
        waiting = self.store.queue.smembers(self._waiting)
        queued = {value.encode() for value in self.queue.job_ids}
        return {value.decode() for value in waiting - queued}  # type: ignore[union-attr]

    def requeue(self, job_ids: set[str]) -> None:
        """Queue jobs again, in front, that are still waiting."""

        def back(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state and state.status == "queued":
                self._enqueue(job_id, pipe, at_front=True)
            else:
                pipe.srem(self._waiting, job_id)

        for job_id in job_ids:
            self._change(job_id, self._waiting, back)

    def progress(self, job_id: str, step: int, total: int) -> Wish:
        """A denoiser step is done; what the outside wants now."""
        with self.store.queue.pipeline() as pipe:
            pipe.zcount(self._interest(job_id), time.time(), "+inf")
            pipe.exists(self.store.key("watched", job_id))
            pipe.hset(self.key(job_id), "step", str(step))
            pipe.expire(self.key(job_id), RECORD_TTL_S)
            if events.worth_telling(step, total):
                events.tell(self.store, pipe, job_id, "progress", step=step, total=total)
            interested, watched, *_ = pipe.execute()
        return Wish(bool(interested), bool(watched))

    def preview(self, job_id: str, step: int, total: int, picture: bytes) -> None:
        """Keep the estimate so far, a picture file, and say so."""
        self.store.put_preview(job_id, picture)
        with self.store.queue.pipeline() as pipe:
            events.tell(self.store, pipe, job_id, "preview", step=step, total=total)
            pipe.execute()

    def succeeded(self, job_id: str, png: bytes) -> None:
        """Keep the picture, then say so."""
        self.store.put_picture(job_id, png)
        state = self.record(job_id)
        if state is not None and state.started:
            seconds = time.time() - state.started
            self._measured(seconds / state.decode.work)
            figures.measured(self.store, NAME, seconds, state.decode.work)
            figures.predicted(self.store, time.time() - state.created, state.eta_s)
        self._end(job_id, "succeeded")

    def failed(self, job_id: str, error: str) -> None:
        """`error` is shown to clients."""
        self._end(job_id, "failed", error)

    def unwanted(self, job_id: str) -> None:
        """A worker stopped, or did not begin, since nobody waits; who came meanwhile is served."""

        def leave(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None:
                return
            if self.wanted(job_id):
                pipe.hset(self.key(job_id), mapping={"status": "queued", "step": 0})
                pipe.zrem(self._leases, job_id)
                self._enqueue(job_id, pipe, at_front=True)
            else:
                self._finish(pipe, job_id, "canceled")

        while not self._change(job_id, self._interest(job_id), leave):
            pass

    def cost(self) -> float | None:
        """Seconds of a megapixel-step on one worker, lately; None until a job was measured."""
        found: bytes | None = self.store.queue.get(self.store.key("cost"))  # type: ignore[assignment]
        return float(found) if found else None

    def _measured(self, cost: float) -> None:
        before = self.cost()
        mean = cost if before is None else (1 - WEIGHT) * before + WEIGHT * cost
        self.store.queue.set(self.store.key("cost"), mean, ex=RECORD_TTL_S)

    def _end(self, job_id: str, status: Status, error: str = "") -> None:
        with self.store.queue.pipeline() as pipe:
            self._finish(pipe, job_id, status, error)
            pipe.execute()

    def _finish(self, pipe: Pipeline, job_id: str, status: Status, error: str = "") -> None:
        pipe.hset(self.key(job_id), mapping=end(status, error))
        pipe.expire(self.key(job_id), RECORD_TTL_S)
        pipe.zrem(self._leases, job_id)
        pipe.srem(self._waiting, job_id)
        kind = events.END_OF[status]
        events.tell(self.store, pipe, job_id, kind, **({"error": error} if error else {}))
        figures.add(self.store, pipe, f"ended:{status}")
        state = self.record(job_id)
        if state is not None:
            told = webhooks.event(replace(state, status=status, error=error))
            webhooks.job_ended(self.store, job_id, *told, pipe)

    def _change(
        self, job_id: str, also: str, change: Callable[[str, JobState | None, Pipeline], None]
    ) -> bool:
        """Apply `change` to the record as it stands; nothing, and False, where it or `also` changes
        meanwhile: another keeper was there, or the worker speaks up."""
        with self.store.queue.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(self.key(job_id), also)  # type: ignore[no-untyped-call]
            state = self.get(job_id)
            pipe.multi()
            change(job_id, state, pipe)
            pipe.execute()
            return True
        return False

    def _enqueue(self, job_id: str, pipe: Pipeline, at_front: bool = False) -> None:
        pipe.delete(Job.key_for(job_id))  # with the expiry that a failure gave it
        pipe.sadd(self._waiting, job_id)
        pipe.expire(self._waiting, RECORD_TTL_S)
        self.queue.enqueue_call(
            TASK,
            args=(job_id,),
            job_id=job_id,
            timeout=self.timeout_s,
            result_ttl=0,
            failure_ttl=FAILED_S,
            description=job_id,
            at_front=at_front,
            pipeline=pipe,
        )

    def _now(self) -> float:
        """The server's clock, one for all workers: seconds since the epoch."""
        seconds, micros = self.store.queue.time()
        return float(seconds) + micros / 1e6

    @property
    def _waiting(self) -> str:
        """Set of the jobs that were queued and that no worker has begun."""
        return self.store.key("waiting")

    @property
    def running(self) -> list[str]:
        """Jobs that workers have begun."""
        return [value.decode() for value in self.store.queue.zrange(self._leases, 0, -1)]  # type: ignore[union-attr]

    @property
    def _leases(self) -> str:
        """Sorted set: running job -> when its worker was last heard of."""
        return self.store.key("running")

    def _interest(self, job_id: str) -> str:
        """Sorted set: caller -> until when it wants the picture."""
        return self.store.key("interest", job_id)

    def key(self, job_id: str) -> str:
        """Of the job's record, a hash."""
        return self.store.key("job", job_id)
