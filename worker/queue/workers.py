"""The live workers, and what operators see of them.

The sorted set `workers` holds the live workers: name -> time of the last heartbeat. The hash
`worker:NAME` describes one: `device`, `started` and, if it may take no further jobs, `drained`.
Times are the Redis server's.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from worker.queue.jobs import LEASE_S, Jobs
from worker.queue.store import RECORD_TTL_S

WORKER_NAME = f"{socket.gethostname()}-{os.getpid()}"
"""Name of this process among the workers."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A live worker."""

    name: str
    device: str  # empty if it is not known
    started: float  # seconds since the epoch
    drained: bool  # it takes no further jobs


def mark_alive(jobs: Jobs, device: str = "") -> None:
    """Record a heartbeat of this worker."""
    now = jobs.now()
    with jobs.store.queue.pipeline() as pipe:
        pipe.zadd(names_key(jobs), {WORKER_NAME: now})
        pipe.zremrangebyscore(names_key(jobs), 0, now - RECORD_TTL_S)
        pipe.expire(names_key(jobs), RECORD_TTL_S)
        pipe.hset(key(jobs), "device", device)
        pipe.hsetnx(key(jobs), "started", now)
        pipe.expire(key(jobs), RECORD_TTL_S)
        pipe.execute()


def mark_stopped(jobs: Jobs) -> None:
    """Remove this worker from the live workers."""
    with jobs.store.queue.pipeline() as pipe:
        pipe.zrem(names_key(jobs), WORKER_NAME)
        pipe.delete(key(jobs))
        pipe.execute()


def names(jobs: Jobs) -> list[str]:
    """Names of the workers that sent a heartbeat in the last `LEASE_S` seconds."""
    since = jobs.now() - LEASE_S
    values: list[bytes] = jobs.store.queue.zrangebyscore(names_key(jobs), since, "+inf")  # type: ignore[assignment]
    return [value.decode() for value in values]


def live(jobs: Jobs) -> Sequence[Worker]:
    """The live workers, sorted by name."""
    found = sorted(names(jobs))
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        for name in found:
            pipe.hgetall(key(jobs, name))
        rows = pipe.execute()
    return [
        Worker(name, row.get(b"device", b"").decode(), float(row.get(b"started", 0)),
               b"drained" in row)
        for name, row in zip(found, rows, strict=True)
    ]  # fmt: skip


def drain(jobs: Jobs, name: str) -> bool:
    """Let a live worker take no further jobs, until it is restarted; False if there is none."""
    if name not in names(jobs):
        return False
    with jobs.store.queue.pipeline() as pipe:
        pipe.hset(key(jobs, name), "drained", 1)
        pipe.expire(key(jobs, name), RECORD_TTL_S)
        pipe.execute()
    return True


def key(jobs: Jobs, name: str = WORKER_NAME) -> str:
    """Key of a worker's record."""
    return jobs.store.key("worker", name)


def names_key(jobs: Jobs) -> str:
    """Key of the live workers."""
    return jobs.store.key("workers")
