"""Figures that processes without a page of their own leave in Redis, for the API's metrics page.

Hash `prefix:metrics`: field -> running sum. Sorted set `prefix:metrics-workers`: worker -> when it
last measured a job, seconds since the epoch.
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
"""How long the figures of a worker outlive its last job."""
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
"""Upper bounds of the histogram of measured over predicted time."""

SUCCEEDED, FAILED, CANCELED = "ended:succeeded", "ended:failed", "ended:canceled"
LEASES_LOST = "leases_lost"
_SECONDS, _WORK = "model_seconds:", "megapixel_steps:"
_RATIO = "eta_ratio:"


@dataclass(frozen=True, slots=True)
class Figures:
    """All sums, since the hash was made."""

    sums: Mapping[str, float]

    def get(self, name: str) -> float:
        """A sum, 0 where nothing was added."""
        return self.sums.get(name, 0.0)

    def named(self, kind: str) -> dict[str, float]:
        """The sums whose field begins with `kind`, by the rest of it."""
        return {k.removeprefix(kind): v for k, v in self.sums.items() if k.startswith(kind)}

    @property
    def model(self) -> dict[str, tuple[float, float]]:
        """Worker -> seconds in the model, and megapixel-steps done in them."""
        work = self.named(_WORK)
        return {w: (s, work[w]) for w, s in self.named(_SECONDS).items() if work.get(w)}

    @property
    def eta_ratios(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulated buckets (upper bound, count) and sum of measured over predicted time."""
        counted = self.named(_RATIO)
        bounds = [*map(str, RATIOS), "+Inf"]
        counts = accumulate(counted.get(bound, 0.0) for bound in bounds)
        return list(zip(bounds, counts, strict=True)), counted.get("sum", 0.0)


def key(store: Store) -> str:
    """Of the hash."""
    return store.key("metrics")


def add(store: Store, pipe: Pipeline, name: str, value: float = 1.0) -> None:
    """Add to a sum, as a part of the transaction that makes it true."""
    pipe.hincrbyfloat(key(store), name, value)
    pipe.expire(key(store), RECORD_TTL_S)


def predicted(store: Store, measured_s: float, predicted_s: float) -> None:
    """A job took `measured_s` from submission to end and was said to take `predicted_s`."""
    if predicted_s <= 0:
        return
    ratio = measured_s / predicted_s
    bound = next((str(b) for b in RATIOS if ratio <= b), "+Inf")
    with contextlib.suppress(RedisError), store.queue.pipeline() as pipe:
        add(store, pipe, _RATIO + bound)
        add(store, pipe, f"{_RATIO}sum", ratio)
        pipe.execute()


def measured(store: Store, worker: str, seconds: float, megapixel_steps: float) -> None:
    """A worker spent seconds in the model; workers silent for `WORKER_TTL_S` are forgotten."""
    now = time.time()
    with contextlib.suppress(RedisError), store.queue.pipeline() as pipe:
        add(store, pipe, _SECONDS + worker, seconds)
        add(store, pipe, _WORK + worker, megapixel_steps)
        pipe.zadd(_workers(store), {worker: now})
        pipe.expire(_workers(store), RECORD_TTL_S)
        pipe.execute()
        _forget(store, pipe, now - WORKER_TTL_S)


def _forget(store: Store, pipe: Pipeline, before: float) -> None:
    """Remove the sums of workers that were last heard of before then."""
    queue: Redis = store.queue
    gone = [w.decode() for w in queue.zrangebyscore(_workers(store), 0, before)]  # type: ignore[union-attr]
    if gone:
        pipe.hdel(key(store), *(kind + w for w in gone for kind in (_SECONDS, _WORK)))
        pipe.zrem(_workers(store), *gone)
        pipe.execute()


def read(store: Store) -> Figures:
    """All figures. Raises `RedisError`."""
    row: dict[bytes, bytes] = store.queue.hgetall(key(store))  # type: ignore[assignment]
    return Figures({name.decode(): float(value) for name, value in row.items()})


def _workers(store: Store) -> str:
    return store.key("metrics-workers")
