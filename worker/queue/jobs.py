"""The contract between API and workers: what a job is, where it stands, how it is handed over."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from models.errors import Quarantined
from worker.queue import counters, events, outbox
from worker.queue.records import Decode, JobState, Status, end, fresh
from worker.queue.store import RECORD_TTL_S, Store
from worker.telemetry import logs, tracing

log = logging.getLogger(__name__)

TASK = "worker.tasks.enhance"
"""The one function that workers run."""
LEASE_S = 10
"""How long a silent worker keeps its job; three missed beats."""
BEAT_S = 3
"""How often a worker says that it is alive."""
DEATHS = 2
"""Workers that may die over one bitstream before it is taken for what killed them."""
DEATHS_TTL_S = 24 * 3600
"""How long that is remembered after the last of them."""
QUARANTINED = f"{DEATHS} workers died while they drew from this bitstream: it is not tried again"
MAX_ATTEMPTS = 5
"""Attempts after which a job is given up whose workers were cut off, but did not die."""
GIVEN_UP = f"its workers were cut off {MAX_ATTEMPTS} times"
FAILED_S = 60
"""How long RQ keeps its own note of a job that raised."""

HOLD_S = 3600
"""How long a submission is interested in its picture, unless it says otherwise."""
MAX_HOLD_S = 24 * 3600
"""How long it may."""
POLL_HOLD_S = 600
"""How long a question about a job renews that interest, at least."""
NEAR = 64
"""Jobs at the queue's head among which a worker looks for those that it draws together."""
WATCHED_S = 30
"""How long previews are drawn after an event stream was last read."""


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
        in one transaction, whoever else submits. Raises `Quarantined`.
        """
        if self.crash_count(decode.digest) >= DEATHS:
            raise Quarantined(QUARANTINED)
        key = self.key(decode.id)
        self.subscribe(decode.id, caller, hold_s)  # a running job that was to stop goes on
        with self.store.queue.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)  # type: ignore[no-untyped-call]
                    state = self.get(decode.id)
                    if state and state.status in {"queued", "running", "succeeded"}:
                        return state, False
                    pipe.multi()
                    pipe.set(self.store.key("bitstream", decode.digest), data, ex=RECORD_TTL_S)
                    pipe.delete(key, events.key(self.store, decode.id))  # with its former end
                    pipe.hset(key, mapping=fresh(decode) | _origin())
                    pipe.expire(key, RECORD_TTL_S)
                    self.enqueue(decode.id, pipe)
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

    def subscribe(self, job_id: str, caller: str, seconds: float) -> None:
        """The caller wants the picture for so long, or for longer if it said so before."""
        key = self.subscribers(job_id)
        with self.store.queue.pipeline() as pipe:
            pipe.zadd(key, {caller: self.now() + seconds}, gt=True)
            pipe.expire(key, RECORD_TTL_S)
            pipe.execute()

    def renew(self, job_id: str, caller: str, seconds: float) -> None:
        """Who asks is interested still; who has withdrawn is not by asking."""
        key = self.subscribers(job_id)
        self.store.queue.zadd(key, {caller: self.now() + seconds}, xx=True, gt=True)

    def save_eta(self, job_id: str, seconds: float) -> None:
        """Remember what was predicted when the job was queued."""
        self.store.queue.hset(self.key(job_id), "eta_s", str(seconds))

    def watch(self, job_id: str) -> None:
        """Somebody reads the job's events: previews are worth drawing for a while."""
        self.store.queue.set(self.store.key("watched", job_id), 1, ex=WATCHED_S)

    def withdraw(self, job_id: str, caller: str) -> bool:
        """The caller no longer wants the picture; whether somebody else does.

        Else a job that waits is canceled, and one that runs will be by its worker.
        """
        self.store.queue.zrem(self.subscribers(job_id), caller)

        def drop(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state and state.status == "queued" and not self.has_subscribers(job_id):
                pipe.lrem(self.queue.key, 0, job_id)
                pipe.delete(Job.key_for(job_id))
                self.finish(pipe, job_id, "canceled")

        while not self.has_subscribers(job_id) and not self.change(
            job_id, self.subscribers(job_id), drop
        ):
            pass
        return self.has_subscribers(job_id)

    def drop(self, job_id: str) -> None:
        """A job was taken from the queue for which nobody waits: the end, unless somebody came."""

        def end(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                return
            if self.has_subscribers(job_id):
                self.put_back(job_id, pipe)
            else:
                self.finish(pipe, job_id, "canceled")

        while not self.change(job_id, self.subscribers(job_id), end):
            pass

    def claim_alike(self, state: JobState, most: int) -> list[str]:
        """Take jobs of the same shape and settings out of the queue, near its head."""
        claimed: list[str] = []
        for job_id in self.queue.get_job_ids(0, NEAR):
            other = self.record(job_id)
            if len(claimed) == most:
                break
            if other is None or other.status != "queued" or job_id == state.id:
                continue
            if other.decode.shape != state.decode.shape or not self.has_subscribers(job_id):
                continue
            if self.crash_count(other.decode.digest):  # what may be poison is drawn alone
                continue
            if self.store.queue.lrem(self.queue.key, 1, job_id):  # else another was quicker
                self.store.queue.delete(Job.key_for(job_id))
                claimed.append(job_id)
        return claimed

    def has_subscribers(self, job_id: str) -> bool:
        """Whether anybody waits for the picture."""
        return bool(self.subscribed([job_id]))

    def subscribed(self, job_ids: Iterable[str]) -> list[str]:
        """Those of them that somebody waits for: workers drop the others."""
        ids, now = list(job_ids), self.now()
        with self.store.queue.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.zcount(self.subscribers(job_id), now, "+inf")
            return [job_id for job_id, found in zip(ids, pipe.execute(), strict=True) if found]

    def position(self, job_id: str) -> int | None:
        """Jobs ahead in the queue, or None where it does not wait there."""
        at: int | None = self.store.queue.lpos(self.queue.key, job_id)  # type: ignore[assignment]
        return at

    def reap(self) -> None:
        """Queue again, in front, what silent workers left. A death counts against the bitstream;
        `DEATHS` of them, or `MAX_ATTEMPTS`, are the end."""
        silent = self.store.queue.zrangebyscore(self.leases, 0, self.now() - LEASE_S)
        owners: set[str] = set()  # several jobs may have been one worker's

        def leave(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            pipe.zrem(self.leases, job_id)
            if state is not None and state.status == "running":
                self.record_crash(state, pipe)
                if state.owner not in owners:
                    counters.add(self.store, pipe, counters.LEASES_LOST)
                owners.add(state.owner)

        for job_id in (value.decode() for value in silent):  # type: ignore[union-attr]
            self.change(job_id, self.leases, leave)

    def record_crash(self, state: JobState, pipe: Pipeline) -> None:
        """An attempt died: another one, or the end, as a part of the transaction `pipe`."""
        digest = state.decode.digest
        known = self.store.queue.sismember(self._crashes(digest), state.owner)
        died = self.crash_count(digest) + (not known)
        pipe.sadd(self._crashes(digest), state.owner)
        pipe.expire(self._crashes(digest), DEATHS_TTL_S)
        if died >= DEATHS:
            self.finish(pipe, state.id, "failed", QUARANTINED)
        elif state.attempts >= MAX_ATTEMPTS:
            self.finish(pipe, state.id, "failed", GIVEN_UP)
        else:
            self.put_back(state.id, pipe)

    def crash_count(self, digest: str) -> int:
        """Workers that died while they drew from a bitstream, in the last `DEATHS_TTL_S`."""
        return int(self.store.queue.scard(self._crashes(digest)))

    def forgive_worker(self, state: JobState) -> None:
        """The worker of an attempt was cut off, but lives: the bitstream is not to blame."""
        self.store.queue.srem(self._crashes(state.decode.digest), state.owner)

    def reset_crashes(self, digest: str, pipe: Pipeline) -> None:
        """A picture was drawn from the bitstream: what workers died of was something else."""
        pipe.delete(self._crashes(digest))

    def put_back(self, job_id: str, pipe: Pipeline, attempts: int | None = None) -> None:
        """In front of the queue again; with `attempts`, as if only so many were made."""
        again: dict[str, str | int] = {"status": "queued", "step": 0}
        if attempts is not None:
            again["attempts"] = attempts
        pipe.hset(self.key(job_id), mapping=again)  # type: ignore[arg-type]
        pipe.zrem(self.leases, job_id)
        self.enqueue(job_id, pipe, at_front=True)
        events.tell(self.store, pipe, job_id, "queued")

    def missing(self) -> set[str]:
        """Jobs that should be in the queue and are not: a worker took them and fell at once."""
        waiting = self.store.queue.smembers(self.waiting)
        queued = {value.encode() for value in self.queue.job_ids}
        return {value.decode() for value in waiting - queued}  # type: ignore[union-attr]

    def requeue(self, job_ids: set[str]) -> None:
        """Queue jobs again, in front, that are still waiting."""

        def back(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                pipe.srem(self.waiting, job_id)
            elif self.position(job_id) is None:  # no other keeper was quicker
                self.enqueue(job_id, pipe, at_front=True)

        for job_id in job_ids:
            self.change(job_id, self.queue.key, back)

    def fail_queued(self, job_id: str, error: str) -> None:
        """Nobody can draw a job that waits; `error` is shown to clients."""

        def end(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is not None and state.status == "queued":
                self.finish(pipe, job_id, "failed", error)

        while not self.change(job_id, self.subscribers(job_id), end):
            pass

    def finish(self, pipe: Pipeline, job_id: str, status: Status, error: str = "") -> None:
        """The job ends, as a part of the transaction `pipe`."""
        pipe.hset(self.key(job_id), mapping=end(status, error))
        pipe.expire(self.key(job_id), RECORD_TTL_S)
        pipe.zrem(self.leases, job_id)
        pipe.srem(self.waiting, job_id)
        kind = events.END_OF[status]
        events.tell(self.store, pipe, job_id, kind, **({"error": error} if error else {}))
        pipe.expire(events.key(self.store, job_id), events.ENDED_TTL_S)
        counters.add(self.store, pipe, f"ended:{status}")
        state = self.record(job_id)
        if state is not None:
            if status != "succeeded":  # a race may have it written twice
                with logs.bound(state.request_id, job_id):
                    level = logging.WARNING if error else logging.INFO
                    log.log(level, "job %s %s", job_id, f"failed: {error}" if error else status)
            told = outbox.event(replace(state, status=status, error=error))
            outbox.job_ended(self.store, job_id, *told, pipe)

    def change(
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

    def enqueue(self, job_id: str, pipe: Pipeline, at_front: bool = False) -> None:
        """Onto RQ's queue, as a part of the transaction `pipe`."""
        pipe.delete(Job.key_for(job_id))  # with the expiry that a failure gave it
        pipe.sadd(self.waiting, job_id)
        pipe.expire(self.waiting, RECORD_TTL_S)
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

    def now(self) -> float:
        """The server's clock, one for all workers: seconds since the epoch."""
        seconds, micros = self.store.queue.time()
        return float(seconds) + micros / 1e6

    @property
    def waiting(self) -> str:
        """Set of the jobs that were queued and that no worker has begun."""
        return self.store.key("waiting")

    @property
    def running(self) -> list[str]:
        """Jobs that workers have begun."""
        return [value.decode() for value in self.store.queue.zrange(self.leases, 0, -1)]  # type: ignore[union-attr]

    @property
    def leases(self) -> str:
        """Sorted set: running job -> when its worker was last heard of."""
        return self.store.key("running")

    def subscribers(self, job_id: str) -> str:
        """Sorted set: caller -> until when it wants the picture."""
        return self.store.key("interest", job_id)

    def _crashes(self, digest: str) -> str:
        """Set of the owners, of attempts, that died."""
        return self.store.key("deaths", digest)

    def key(self, job_id: str) -> str:
        """Of the job's record, a hash."""
        return self.store.key("job", job_id)
