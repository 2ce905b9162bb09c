"""Targets: objects to which finished pictures are to be written, and the queue of these writes.

A target belongs to a job and a caller. The caller sees the job as succeeded once all its targets
are written, and as failed if one cannot be; other callers of the same job do not see them. Writes
become due when the job succeeds, or at once if it has succeeded already. A worker claims a write
for `LEASE_S`; if it dies, the write becomes due again. A repeated write does no harm.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import redis
from redis.client import Pipeline

from models.errors import ParameterError
from models.image import OutputFormat
from worker.queue import counters, events, outbox
from worker.queue.object_stores import MAX_SECONDS
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S, Store

LEASE_S = MAX_SECONDS + 10
"""How long a worker has for one write."""
WAKE_S = 2
"""How long one wait of a worker for writes may block; writes are late by at most as much."""
MAX_TARGETS = 32
"""Largest number of targets of one job and caller."""

_ADD = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
"""
_DUE = """
local now = redis.call('TIME')[1]
if redis.call('HGET', KEYS[2], 'status') ~= 'succeeded' then return end
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  if cjson.decode(entries[i + 1]).status == 'pending' then
    redis.call('ZADD', KEYS[3], 'NX', now, ARGV[3] .. ' ' .. entries[i])
    redis.call('LPUSH', KEYS[4], '1')
  end
end
redis.call('LTRIM', KEYS[4], 0, 63)
redis.call('EXPIRE', KEYS[3], ARGV[4])
redis.call('EXPIRE', KEYS[4], 60)
"""
_CLAIM = """
local now = redis.call('TIME')[1]
local due = redis.call('ZRANGEBYSCORE', KEYS[1], 0, now, 'LIMIT', 0, 1)[1]
if due then redis.call('ZADD', KEYS[1], now + ARGV[1], due) end
return due
"""
_POSTPONE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], 'XX', redis.call('TIME')[1] + ARGV[3], ARGV[4])
"""


class TooManyTargets(ParameterError):
    """The caller has `MAX_TARGETS` pending targets for one decode."""


@dataclass(frozen=True, slots=True)
class Target:
    """An object to write, and what has become of it."""

    caller: str
    reference: str
    format: OutputFormat
    status: Literal["pending", "written", "failed"] = "pending"
    etag: str = ""
    error: str = ""  # shown to the caller
    kind: str = ""  # the problem type of that error
    realism: float = 1.0
    began: float = 0.0  # time of the first try, seconds since the epoch; 0 before
    tries: int = 0

    @property
    def field(self) -> str:
        """The target's field in the hash of its job; callers' names hold no space."""
        return f"{self.caller} {self.reference}"

    def dumps(self) -> str:
        """The value of that field."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, value: bytes) -> "Target":
        """Parse the value of that field."""
        return cls(**json.loads(value))


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets in the queue store."""

    store: Store

    def of(self, job_id: str, caller: str | None = None) -> list[Target]:
        """The targets of a job, of one caller or of all."""
        row: dict[bytes, bytes] = self.store.queue.hgetall(self.key(job_id))  # type: ignore[assignment]
        found = [Target.loads(value) for _, value in sorted(row.items())]
        return [t for t in found if caller is None or t.caller == caller]

    def add(self, job_id: str, target: Target) -> None:
        """Add a target, in place of earlier ones of the caller that failed.

        Of more than `MAX_TARGETS`, those written first are forgotten. A pending one is due now if
        the job has succeeded already. Raises `TooManyTargets` if the caller has `MAX_TARGETS`
        others that are pending.
        """
        others = [t for t in self.of(job_id, target.caller) if t.field != target.field]
        ended = [t for t in others if t.status == "failed"]
        written = sorted((t for t in others if t.status == "written"), key=lambda t: t.began)
        excess = len(others) - len(ended) - MAX_TARGETS + 1
        if excess > len(written):
            raise TooManyTargets(
                f"target: you have {MAX_TARGETS} pending targets for this decode, the maximum; "
                "wait until one of them is written"
            )
        ended += written[: max(excess, 0)]
        if ended:
            self.store.queue.hdel(self.key(job_id), *(t.field for t in ended))
        self._run(_ADD + _DUE, self.store.queue, job_id, target.field, target.dumps())

    def job_succeeded(self, job_id: str, pipe: Pipeline) -> None:
        """Make the pending targets of a job due, as part of the transaction that ends it."""
        self._run(_DUE, pipe, job_id)

    def retry(self, job_id: str, caller: str) -> None:
        """Make the caller's failed targets pending again."""
        for target in self.of(job_id, caller):
            if target.status == "failed":
                fresh = Target(caller, target.reference, target.format, realism=target.realism)
                self._run(_ADD + _DUE, self.store.queue, job_id, fresh.field, fresh.dumps())

    def forget(self, job_id: str, pipe: Pipeline) -> None:
        """Drop all targets of a job, as part of the transaction that cancels it."""
        pipe.delete(self.key(job_id))

    def withdraw(self, job_id: str, caller: str) -> None:
        """Drop the targets of a caller that are not written yet."""
        for target in self.of(job_id, caller):
            self.drop(job_id, target)

    def drop(self, job_id: str, target: Target) -> None:
        """Drop a target unless it has been written or has failed."""
        if target.status == "pending":
            self.store.queue.hdel(self.key(job_id), target.field)
            self.store.queue.zrem(self.due, f"{job_id} {target.field}")

    def wait(self) -> None:
        """Return once a write has become due, or after `WAKE_S`."""
        self.store.queue.blpop([self._wake], timeout=WAKE_S)

    def claim(self) -> tuple[str, Target] | None:
        """Claim a write that is due: job id and target; None if there is none."""
        while True:
            member = self.store.queue.eval(_CLAIM, 1, self.due, LEASE_S)
            if member is None:
                return None
            job_id, _, name = member.decode().partition(" ")
            value: bytes | None = self.store.queue.hget(self.key(job_id), name)  # type: ignore[assignment]
            target = Target.loads(value) if value else None
            if target is not None and target.status == "pending":
                return job_id, target
            self.store.queue.zrem(self.due, member)  # withdrawn, or expired

    def postpone(self, job_id: str, target: Target, seconds: float) -> None:
        """Make a claimed write due again in `seconds`."""
        arguments = target.field, target.dumps(), seconds, f"{job_id} {target.field}"
        self.store.queue.eval(_POSTPONE, 2, self.key(job_id), self.due, *arguments)

    def release(self, job_id: str, target: Target) -> None:
        """Stop a claimed write: it becomes due again when the job succeeds."""
        self.store.queue.zrem(self.due, f"{job_id} {target.field}")

    def settle(self, state: JobState, target: Target) -> None:
        """Record that a target was written or has failed, and tell its caller.

        With the caller's last target, the webhooks and the event that waited for it are sent.
        """
        while True:
            with self.store.queue.pipeline() as pipe:
                try:
                    pipe.watch(self.key(state.id))  # type: ignore[no-untyped-call]
                    owned = {t.field: t for t in self.of(state.id, target.caller)}
                    pipe.multi()
                    pipe.zrem(self.due, f"{state.id} {target.field}")
                    if target.field in owned:  # not withdrawn meanwhile
                        owned[target.field] = target
                        self._record(pipe, state, target, owned.values())
                    pipe.execute()
                    return
                except redis.WatchError:
                    continue

    def _record(
        self, pipe: Pipeline, state: JobState, target: Target, owned: Iterable[Target]
    ) -> None:
        pipe.hset(self.key(state.id), target.field, target.dumps())
        pipe.expire(self.key(state.id), RECORD_TTL_S)
        counters.add(self.store, pipe, f"{counters.TARGETS}{target.status}")
        seen = seen_by_caller(state, owned)
        if seen.status in events.END_OF:
            data = {"error": seen.error} if seen.error else {}
            events.append(self.store, pipe, state.id, events.END_OF[seen.status], **data)
            pipe.expire(events.key(self.store, state.id), events.ENDED_TTL_S)
            event = outbox.event(seen)
            outbox.job_ended(self.store, state.id, *event, pipe, only=target.caller)

    def _run(
        self, script: str, client: redis.Redis, job_id: str, field: str = "", value: str = ""
    ) -> None:
        keys = self.key(job_id), self.store.key("job", job_id), self.due, self._wake
        client.eval(script, 4, *keys, field, value, job_id, RECORD_TTL_S)

    def key(self, job_id: str) -> str:
        """Key of a hash: caller and reference -> target."""
        return self.store.key("targets", job_id)

    @property
    def due(self) -> str:
        """Key of a sorted set: job id, caller and reference -> time at which the write is due."""
        return self.store.key("targets-due")

    @property
    def _wake(self) -> str:
        """Key of a list that workers wait for; its values mean nothing."""
        return self.store.key("targets-wake")


def seen_by_caller(state: JobState, targets: Iterable[Target]) -> JobState:
    """A job's state as a caller with these targets sees it.

    A target that is written outlives the cached picture.
    """
    owned = list(targets)
    if not owned or state.status not in {"succeeded", "expired"}:
        return state
    failed = next((t for t in owned if t.status == "failed"), None)
    if failed is not None:
        return replace(state, status="failed", error=failed.error)
    pending = any(t.status == "pending" for t in owned)
    return replace(state, status="running" if pending else "succeeded")
