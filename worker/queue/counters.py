"""Counters that workers keep in Redis, for the API's metrics endpoint.

Hash `prefix:metrics`: name -> running sum. Sorted set `prefix:metrics-workers`: worker -> time of
its last job, seconds since the epoch.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from redis import Redis
from redis.client import Pipeline

from worker.queue.store import RECORD_TTL_S, RedisError, Store

WORKER_TTL_S = 24 * 3600
"""How long the counters of a worker are kept after its last job (RQ's own limit is separate)."""
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
"""Upper bounds of the histogram of measured over predicted time."""

SUCCEEDED, FAILED, CANCELED = "ended:succeeded", "ended:failed", "ended:canceled"
LEASES_LOST = "leases_lost"
RESULTS_LOST = "results_lost"
TARGETS = "targets:"
"""Prefix of the counters of targets, by their status."""
_SECONDS, _WORK = "model_seconds:", "megapixel_steps:"
_RATIO = "eta_ratio:"


@dataclass(frozen=True, slots=True)
class Counters:
    """All counters at one time."""

    sums: Mapping[str, float]

    def get(self, name: str) -> float:
        """A counter's value; 0 for one that was never incremented."""
        return self.sums.get(name, 0.0)

    def with_prefix(self, prefix: str) -> dict[str, float]:
        """The counters whose names begin with `prefix`, by the rest of the name."""
        return {k.removeprefix(prefix): v for k, v in self.sums.items() if k.startswith(prefix)}

    @property
    def model_time(self) -> dict[str, tuple[float, float]]:
        """Worker -> seconds that it spent on jobs, and megapixel-steps of these jobs."""
        work = self.with_prefix(_WORK)
        return {w: (s, work[w]) for w, s in self.with_prefix(_SECONDS).items() if work.get(w)}

    @property
    def eta_ratios(self) -> tuple[list[tuple[str, float]], float]:
        """Histogram of measured over predicted time: cumulative (upper bound, count), and sum."""
        counts = self.with_prefix(_RATIO)
        bounds = [*map(str, RATIOS), "+Inf"]
        cumulative = accumulate(counts.get(bound, 0.0) for bound in bounds)
        return list(zip(bounds, cumulative, strict=True)), counts.get("sum", 0.0)


def key(store: Store) -> str:
    """Redis key of the hash of counters."""
    return store.key("metrics")


def add(store: Store, pipe: Pipeline, name: str, value: float = 1.0) -> None:
    """Increase a counter, as part of the transaction `pipe`."""
    pipe.hincrbyfloat(key(store), name, value)
    pipe.expire(key(store), RECORD_TTL_S)


def count(store: Store, name: str) -> None:
    """Increase a counter by one; without effect while Redis is down."""
    with contextlib.suppress(RedisError), store.queue.pipeline() as pipe:
        add(store, pipe, name)
        pipe.execute()


def add_eta_ratio(store: Store, measured_s: float, predicted_s: float) -> None:
    """Count a job in the histogram of measured over predicted time.

    A prediction of 0 or less means that there was none: nothing is counted.
    """
    if predicted_s <= 0:
        return
    ratio = measured_s / predicted_s
    bound = next((str(b) for b in RATIOS if ratio <= b), "+Inf")
    with contextlib.suppress(RedisError), store.queue.pipeline() as pipe:
        add(store, pipe, _RATIO + bound)
        add(store, pipe, f"{_RATIO}sum", ratio)
        pipe.execute()


def add_model_time(store: Store, worker: str, seconds: float, megapixel_steps: float) -> None:
    """Add a job to a worker's counters; drop workers without a job for `WORKER_TTL_S`."""
    now = time.time()
    with contextlib.suppress(RedisError), store.queue.pipeline() as pipe:
        add(store, pipe, _SECONDS + worker, seconds)
        add(store, pipe, _WORK + worker, megapixel_steps)
        pipe.zadd(_workers(store), {worker: now})
        pipe.expire(_workers(store), RECORD_TTL_S)
        pipe.execute()
        _remove_idle(store, pipe, now - WORKER_TTL_S)


def _remove_idle(store: Store, pipe: Pipeline, before: float) -> None:
    """Remove the counters of workers whose last job ended before a time."""
    queue: Redis = store.queue
    idle = [w.decode() for w in queue.zrangebyscore(_workers(store), 0, before)]  # type: ignore[union-attr]
    if idle:
        pipe.hdel(key(store), *(prefix + w for w in idle for prefix in (_SECONDS, _WORK)))
        pipe.zrem(_workers(store), *idle)
        pipe.execute()


def read(store: Store) -> Counters:
    """Read all counters. Raises `RedisError`."""
    row: dict[bytes, bytes] = store.queue.hgetall(key(store))  # type: ignore[assignment]
    return Counters({name.decode(): float(value) for name, value in row.items()})


def _workers(store: Store) -> str:
    return store.key("metrics-workers")
