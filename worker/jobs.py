"""The contract between API and workers: what a job is, where it stands, how it is handed over."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from models.tiers import Settings
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

Status = Literal["queued", "running", "succeeded", "failed", "expired"]


@dataclass(frozen=True, slots=True)
class Decode:
    """What is asked for. Two equal requests are one job: its id is the digest of its content."""

    digest: str  # SHA-256 of the bitstream, hex
    tier: str
    settings: Settings
    seed: int
    codec: str  # weights ids
    decoder: str
    quality: int
    width: int
    height: int

    @property
    def id(self) -> str:
        """32 hex digits of SHA-256 over the lines: recipe's name, digest, settings, seed, weights.

        The tier's name is no part of it: equal settings are equal pictures.
        """
        settings = json.dumps(asdict(self.settings), sort_keys=True, separators=(",", ":"))
        lines = ("afterimage-1", self.digest, settings, str(self.seed), self.codec, self.decoder)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's record. Times are seconds since the epoch, 0 while they have not come."""

    id: str
    status: Status
    decode: Decode
    step: int
    total: int
    attempts: int
    created: float
    started: float
    ended: float
    error: str


class Jobs:
    """Job records and the RQ queue, over the queue store."""

    def __init__(self, store: Store, timeout_s: int = 3600) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self.queue = Queue(
            f"{store.prefix}-decodes", connection=store.queue, serializer=JSONSerializer
        )

    def submit(self, decode: Decode, data: bytes) -> tuple[JobState, bool]:
        """Queue a job unless it is queued, running or done; its state, and whether it is new.

        Record, bitstream and queue entry are written in one transaction, whoever else submits.
        """
        key = self._key(decode.id)
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
                    pipe.hset(key, mapping=_fresh(decode))
                    pipe.expire(key, RECORD_TTL_S)
                    self._enqueue(decode.id, pipe)
                    pipe.execute()
                except redis.WatchError:
                    continue
                state = self.get(decode.id)
                if state is not None:
                    return state, True

    def get(self, job_id: str) -> JobState | None:
        """The job's state, or None where there is no record; `expired` once its picture is gone."""
        row: dict[bytes, bytes] = self.store.queue.hgetall(self._key(job_id))  # type: ignore[assignment]
        if b"decode" not in row:  # nothing, or what a worker wrote after the record was lost
            return None
        fields = {k.decode(): v.decode() for k, v in row.items()}
        request = json.loads(fields["decode"])
        decode = Decode(**{**request, "settings": Settings(**request["settings"])})
        status = fields["status"]
        if status == "succeeded" and not self.store.cache.exists(self.store.key("picture", job_id)):
            status = "expired"
        return JobState(
            id=job_id,
            status=status,  # type: ignore[arg-type]
            decode=decode,
            step=int(fields["step"]),
            total=int(fields["total"]),
            attempts=int(fields["attempts"]),
            created=float(fields["created"]),
            started=float(fields["started"]),
            ended=float(fields["ended"]),
            error=fields["error"],
        )

    def position(self, job_id: str) -> int | None:
        """Jobs ahead in the queue, or None where it does not wait there."""
        at: int | None = self.store.queue.lpos(self.queue.key, job_id)  # type: ignore[assignment]
        return at

    def started(self, job_id: str) -> None:
        """A worker begins: counts the attempt and takes the lease."""
        with self.store.queue.pipeline() as pipe:
            pipe.hset(self._key(job_id), mapping={"status": "running", "started": time.time()})
            pipe.hincrby(self._key(job_id), "attempts", 1)
            pipe.srem(self._waiting, job_id)
            pipe.zadd(self._leases, {job_id: self._now()})
            pipe.expire(self._leases, RECORD_TTL_S)
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
                    pipe.hset(self._key(job_id), mapping={"status": "queued", "step": 0})
                    self._enqueue(job_id, pipe, at_front=True)
                else:
                    pipe.hset(self._key(job_id), mapping=_end("failed", GIVEN_UP))

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

    def progress(self, job_id: str, step: int) -> None:
        """A denoiser step is done."""
        with self.store.queue.pipeline() as pipe:
            pipe.hset(self._key(job_id), "step", str(step))
            pipe.expire(self._key(job_id), RECORD_TTL_S)
            pipe.execute()

    def succeeded(self, job_id: str, png: bytes) -> None:
        """Keep the picture, then say so."""
        self.store.put_picture(job_id, png)
        self._finish(job_id, "succeeded", "")

    def failed(self, job_id: str, error: str) -> None:
        """`error` is shown to clients."""
        self._finish(job_id, "failed", error)

    def _finish(self, job_id: str, status: Status, error: str) -> None:
        with self.store.queue.pipeline() as pipe:
            pipe.hset(self._key(job_id), mapping=_end(status, error))
            pipe.expire(self._key(job_id), RECORD_TTL_S)
            pipe.zrem(self._leases, job_id)
            pipe.srem(self._waiting, job_id)
            pipe.execute()

    def _change(
        self, job_id: str, also: str, change: Callable[[str, JobState | None, Pipeline], None]
    ) -> None:
        """Apply `change` to the record as it stands; nothing where it or `also` changes meanwhile:
        another keeper was there, or the worker speaks up."""
        with self.store.queue.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(self._key(job_id), also)  # type: ignore[no-untyped-call]
            state = self.get(job_id)
            pipe.multi()
            change(job_id, state, pipe)
            pipe.execute()

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
    def _leases(self) -> str:
        """Sorted set: running job -> when its worker was last heard of."""
        return self.store.key("running")

    def _key(self, job_id: str) -> str:
        return self.store.key("job", job_id)


def _end(status: Status, error: str) -> dict[Any, Any]:
    return {"status": status, "ended": time.time(), "error": error}


def _fresh(decode: Decode) -> dict[Any, Any]:
    return {
        "status": "queued",
        "decode": json.dumps(asdict(decode)),
        "step": 0,
        "total": decode.settings.steps,
        "attempts": 0,
        "created": time.time(),
        "started": 0,
        "ended": 0,
        "error": "",
    }
