"""Job records and the queue, as the API and the workers share them.

The API submits jobs, subscribes callers to them and reads their state. Workers take jobs from the
queue and hold a lease on each while they run it (`worker.attempt`). A job without subscribers is
canceled.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import redis
from redis.client import Pipeline

from models.errors import Quarantined
from worker.queue import counters, events, order, outbox, submitters
from worker.queue.line import Line
from worker.queue.quarantine import QUARANTINED, Quarantine
from worker.queue.records import DecodeRequest, JobState, Priority, Status, ended_fields
from worker.queue.store import RECORD_TTL_S, Store
from worker.queue.targets import Targets
from worker.telemetry import logs, tracing

log = logging.getLogger(__name__)

LEASE_S = 10
"""How long a worker keeps its job without a heartbeat: three missed heartbeats."""
HEARTBEAT_S = 3
"""Interval of a worker's heartbeats."""
MAX_ATTEMPTS = 5
"""Number of attempts after which a job fails if its workers lost their leases without a crash."""
TOO_MANY_ATTEMPTS = (
    f"gave up after {MAX_ATTEMPTS} attempts, in each of which the worker lost its connection to "
    "Redis; send the bitstream again"
)

SUBSCRIPTION_S = 3600
"""How long a submission subscribes its caller, by default."""
MAX_SUBSCRIPTION_S = 24 * 3600
"""Longest subscription that a submission may ask for."""
POLL_SUBSCRIPTION_S = 600
"""After a poll, the caller's subscription lasts at least this long."""
BATCH_LOOKAHEAD = 64
"""Number of jobs at the head of the queue among which a worker looks for similar ones."""
WATCHED_S = 30
"""How long the worker makes previews after a client last read the job's event stream."""

Change = Callable[[str, JobState | None, Pipeline], None]
"""Adds commands to a transaction, given the job's id and its record."""


class Jobs:
    """Job records and the RQ queues, in the queue store."""

    def __init__(self, store: Store, timeout_s: int = 3600) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self.line = Line(store, timeout_s)
        self.queue = self.line.base
        self.quarantine = Quarantine(store)
        self.targets = Targets(store)

    def submit(
        self,
        decode: DecodeRequest,
        data: bytes,
        caller: str = "",
        subscription_s: float = SUBSCRIPTION_S,
        priority: Priority = "interactive",
        weight: float = 1.0,
        eta_s: float = 0.0,
    ) -> tuple[JobState, bool]:
        """Queue a job unless it is queued, running or done already.

        It waits in the caller's queue of that priority; a job that is queued already is moved there
        if it will be drawn earlier. Within a priority, callers get drawings in proportion to their
        weights. `eta_s` is the predicted time until it is done; 0: unknown.

        Returns its state, and True if this call queued it. One transaction writes the record, the
        bitstream and the queue entry, so that concurrent calls queue only one job. The caller is
        subscribed in any case. Raises `Quarantined`.
        """
        if self.quarantine.holds(decode.digest):
            raise Quarantined(QUARANTINED)
        key = self.key(decode.id)
        is_subscribed, until = False, self.now() + subscription_s
        with self.store.queue.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)  # type: ignore[no-untyped-call]
                    state = self.get(decode.id)
                    kept = state and state.status in {"queued", "running", "succeeded"}
                    if kept and not is_subscribed:  # first: keeps a running job running
                        self.subscribe(decode.id, caller, subscription_s)
                        is_subscribed = True
                        continue
                    new = JobState.queued(
                        decode, logs.request_id.get(), tracing.inject().get("traceparent", ""),
                        caller, priority, weight, eta_s,
                    )  # fmt: skip
                    if state and state.status == "queued":
                        return self._move_forward(state, new, pipe), False
                    if state and state.status in {"running", "succeeded"}:
                        return state, False
                    pipe.multi()
                    self._subscribe(pipe, decode.id, caller, until)
                    self._write_new(pipe, new, data)
                    pipe.execute()
                    return new, True
                except redis.WatchError:
                    continue

    def _write_new(self, pipe: Pipeline, new: JobState, data: bytes) -> None:
        """Write the record, the bitstream and the queue entry of a job."""
        key = self.key(new.id)
        pipe.set(self.store.key("bitstream", new.decode.digest), data, ex=RECORD_TTL_S)
        pipe.delete(key, events.key(self.store, new.id))  # earlier run
        pipe.hset(key, mapping=new.new_record())
        pipe.expire(key, RECORD_TTL_S)
        self.enqueue(new, pipe)
        events.append(self.store, pipe, new.id, "queued")

    def _move_forward(self, state: JobState, new: JobState, pipe: Pipeline) -> JobState:
        """Move a queued job to the queue of a caller that submitted it again, if it will be drawn
        earlier there; return its state. Raises `WatchError` if a worker took it meanwhile."""
        queue = self.line.queue_of(state)
        pipe.watch(queue.key)  # type: ignore[no-untyped-call]
        if not self.line.is_earlier(new, state):
            return state
        place = {"caller": new.caller, "priority": new.priority, "weight": new.weight}
        pipe.multi()
        queue.discard(state.id, pipe)
        pipe.hset(self.key(state.id), mapping=place)  # type: ignore[arg-type]
        self.enqueue(new, pipe)
        pipe.execute()
        return replace(state, **place)  # type: ignore[arg-type]

    def get(self, job_id: str) -> JobState | None:
        """The job's state; None without a record.

        If the job succeeded and its picture has expired, the status is `expired`.
        """
        state = self.record(job_id)
        if state is None or state.status != "succeeded":
            return state
        has_picture = self.store.cache.exists(self.store.key("picture", job_id))
        # the worker may have died after it committed the picture and before it published it
        if has_picture or self.store.publish(job_id, state.fence):
            return state
        if self.store.recall(job_id) is not None:
            return state
        return replace(state, status="expired")

    def record(self, job_id: str) -> JobState | None:
        """Like `get`, but does not check the cache for the picture: never returns `expired`."""
        row: dict[bytes, bytes] = self.store.queue.hgetall(self.key(job_id))  # type: ignore[assignment]
        return JobState.of(job_id, row)

    def subscribe(self, job_id: str, caller: str, seconds: float) -> None:
        """Subscribe the caller to the job for `seconds`; never shortens a subscription."""
        with self.store.queue.pipeline() as pipe:
            self._subscribe(pipe, job_id, caller, self.now() + seconds)
            pipe.execute()

    def _subscribe(self, pipe: Pipeline, job_id: str, caller: str, until: float) -> None:
        key = self.subscribers(job_id)
        pipe.zadd(key, {caller: until}, gt=True)
        pipe.expire(key, RECORD_TTL_S)

    def renew(self, job_id: str, caller: str, seconds: float) -> None:
        """Extend the caller's subscription; no effect after `withdraw`."""
        key = self.subscribers(job_id)
        self.store.queue.zadd(key, {caller: self.now() + seconds}, xx=True, gt=True)

    def watch(self, job_id: str, callers: Iterable[str], until: float, pipe: Pipeline) -> None:
        """Extend the callers' subscriptions, and ask for previews for `WATCHED_S` seconds."""
        pipe.set(self.store.key("watched", job_id), 1, ex=WATCHED_S)
        pipe.zadd(self.subscribers(job_id), dict.fromkeys(callers, until), xx=True, gt=True)

    def withdraw(self, job_id: str, caller: str) -> bool:
        """End the caller's subscription; True if the job has other subscribers.

        Without other subscribers, a queued job is canceled here, and a running one by its worker.
        """
        self.store.queue.zrem(self.subscribers(job_id), caller)
        self.targets.withdraw(job_id, caller)

        def cancel(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state and state.status == "queued" and not self.has_subscribers(job_id):
                self.line.queue_of(state).discard(job_id, pipe)
                self.finish(pipe, state, "canceled")

        while not self.has_subscribers(job_id) and not self.change(
            job_id, self.subscribers(job_id), cancel
        ):
            pass
        return self.has_subscribers(job_id)

    def cancel_unless_subscribed(self, job_id: str) -> None:
        """Cancel a job that was taken from the queue; put it back if it has subscribers by now."""

        def cancel(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                return
            if self.has_subscribers(job_id):
                self.put_back(state, pipe)
            else:
                self.finish(pipe, state, "canceled")

        self._retry(job_id, cancel)

    def claim_similar(self, state: JobState, count: int) -> list[str]:
        """Take up to `count` jobs of the same shape, settings and priority that are soon due."""
        claimed: list[str] = []
        for job_id in order.first(self.line, BATCH_LOOKAHEAD, state.priority):
            if len(claimed) == count:
                break
            other = self.record(job_id)
            if other is None or other.status != "queued" or job_id == state.id:
                continue
            if other.decode.shape != state.decode.shape or not self.has_subscribers(job_id):
                continue
            if self.quarantine.count(other.decode.digest):  # may crash this worker too: runs alone
                continue
            if self.line.claim(other):
                claimed.append(job_id)
        return claimed

    def has_subscribers(self, job_id: str) -> bool:
        """True while at least one caller is subscribed to the job."""
        return bool(self.subscribed([job_id]))

    def subscribed(self, job_ids: Iterable[str]) -> list[str]:
        """Return the ids that have subscribers; workers skip the others."""
        ids, now = list(job_ids), self.now()
        with self.store.queue.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.zcount(self.subscribers(job_id), now, "+inf")
            return [job_id for job_id, count in zip(ids, pipe.execute(), strict=True) if count]

    def reap(self) -> None:
        """Put jobs whose worker missed its heartbeats back at the front of the queue.

        Each counts as a crash on its bitstream. After `MAX_CRASHES` crashes or `MAX_ATTEMPTS`
        attempts, the job fails instead.
        """
        silent = self.store.queue.zrangebyscore(self.leases, 0, self.now() - LEASE_S)
        owners: set[str] = set()  # a worker that loses a batch is counted once

        def expire(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            pipe.zrem(self.leases, job_id)
            if state is not None and state.status == "running":
                self.record_crash(state, pipe)
                if state.owner not in owners:
                    counters.add(self.store, pipe, counters.LEASES_LOST)
                owners.add(state.owner)

        for job_id in (value.decode() for value in silent):  # type: ignore[union-attr]
            self.change(job_id, self.leases, expire)

    def record_crash(self, state: JobState, pipe: Pipeline) -> None:
        """Count a crash of the job's worker, and put the job back or fail it, as part of `pipe`."""
        if self.quarantine.add(state, pipe):
            self.finish(pipe, state, "failed", QUARANTINED)
        elif state.attempts >= MAX_ATTEMPTS:
            self.finish(pipe, state, "failed", TOO_MANY_ATTEMPTS)
        else:
            self.put_back(state, pipe)

    def put_back(self, state: JobState, pipe: Pipeline, attempts: int | None = None) -> None:
        """Queue a running job again, at the front; `attempts` replaces its number of attempts."""
        fields: dict[str, str | int] = {"status": "queued", "step": 0}
        if attempts is not None:
            fields["attempts"] = attempts
        pipe.hset(self.key(state.id), mapping=fields)  # type: ignore[arg-type]
        pipe.zrem(self.leases, state.id)
        self.enqueue(state, pipe, at_front=True)
        events.append(self.store, pipe, state.id, "queued")

    def missing(self) -> set[str]:
        """Jobs with status `queued` that are in no queue.

        A worker took them and crashed before it began an attempt, or is about to begin one.
        """
        waiting = self.store.queue.smembers(self.waiting)
        return {value.decode() for value in waiting} - self.line.job_ids()  # type: ignore[union-attr]

    def requeue(self, job_ids: set[str]) -> None:
        """Put missing jobs back at the front of their callers' queues."""

        def restore(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is None or state.status != "queued":
                pipe.srem(self.waiting, job_id)
            elif not self.line.contains(state):  # no other worker restored it already
                self.enqueue(state, pipe, at_front=True)

        for job_id in job_ids:
            known = self.record(job_id)
            queue = self.line.queue_of(known) if known else self.queue
            self.change(job_id, queue.key, restore)

    def fail_queued(self, job_id: str, error: str) -> None:
        """Fail a job that is queued; clients see `error`."""

        def fail(job_id: str, state: JobState | None, pipe: Pipeline) -> None:
            if state is not None and state.status == "queued":
                self.finish(pipe, state, "failed", error)

        self._retry(job_id, fail)

    def finish(self, pipe: Pipeline, state: JobState, status: Status, error: str = "") -> None:
        """End a job, as part of the transaction `pipe`: record, event, counter and webhooks."""
        key = self.key(state.id)
        pipe.hset(key, mapping=ended_fields(status, error))
        pipe.expire(key, RECORD_TTL_S)
        submitters.keep(self.store, state.id, pipe)
        pipe.zrem(self.leases, state.id)
        pipe.srem(self.waiting, state.id)
        data = {"error": error} if error else {}
        events.append(self.store, pipe, state.id, events.END_OF[status], **data)
        pipe.expire(events.key(self.store, state.id), events.ENDED_TTL_S)
        counters.add(self.store, pipe, f"ended:{status}")
        if status != "succeeded":  # logged by the worker once the transaction has succeeded
            with logs.bound(state.request_id, state.id):
                level = logging.WARNING if error else logging.INFO
                log.log(level, "job %s %s", state.id, f"failed: {error}" if error else status)
        event = outbox.event(replace(state, status=status, error=error))
        outbox.job_ended(self.store, state.id, *event, pipe)
        if status == "succeeded":
            self.targets.job_succeeded(state.id, pipe)
        elif status == "canceled":
            self.targets.forget(state.id, pipe)

    def change(self, job_id: str, also: str, change: Change) -> bool:
        """Run `change` in a transaction that watches the job's record and the key `also`.

        If another client changed either of them meanwhile, writes nothing and returns False.
        """
        with self.store.queue.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(self.key(job_id), also)  # type: ignore[no-untyped-call]
            state = self.get(job_id)
            pipe.multi()
            change(job_id, state, pipe)
            pipe.execute()
            return True
        return False

    def _retry(self, job_id: str, change: Change) -> None:
        """Run `change`; repeat it if another client changed the record or the subscribers."""
        while not self.change(job_id, self.subscribers(job_id), change):
            pass

    def enqueue(self, state: JobState, pipe: Pipeline, at_front: bool = False) -> None:
        """Add a job to its caller's queue, as part of the transaction `pipe`."""
        pipe.sadd(self.waiting, state.id)
        pipe.expire(self.waiting, RECORD_TTL_S)
        self.line.add(state, pipe, at_front)

    def now(self) -> float:
        """Time on the Redis server's clock, which all workers share: seconds since the epoch."""
        seconds, micros = self.store.queue.time()
        return float(seconds) + micros / 1e6

    @property
    def waiting(self) -> str:
        """Key of the set of queued jobs, including those that a worker has just taken."""
        return self.store.key("waiting")

    @property
    def running(self) -> list[str]:
        """Ids of the jobs that workers run."""
        return [value.decode() for value in self.store.queue.zrange(self.leases, 0, -1)]  # type: ignore[union-attr]

    @property
    def leases(self) -> str:
        """Key of a sorted set: running job -> time of its worker's last heartbeat."""
        return self.store.key("running")

    def subscribers(self, job_id: str) -> str:
        """Key of a sorted set: caller -> time at which its subscription ends."""
        return self.store.key("interest", job_id)

    def key(self, job_id: str) -> str:
        """Key of the job's record, a hash."""
        return self.store.key("job", job_id)
