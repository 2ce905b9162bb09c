"""Metrics that are no process's own: the queue's state, and what workers left in Redis."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from worker.queue import counters, estimates
from worker.queue.jobs import Jobs
from worker.queue.store import RedisError

_LOOKED_AT = 16
"""Jobs at the queue's head among which the oldest is sought: those in front were queued first,
except some that were queued again."""


class Queue(Collector):
    """What Redis knows, asked at every scrape; `afterimage_redis_up` 0 alone while the queue's is
    away, and 0 too while the cache's is."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def describe(self) -> list[Metric]:
        """Nothing in advance: registering asks no Redis."""
        return []

    def collect(self) -> Iterator[Metric]:
        found: list[Metric] = []
        up = 0.0
        with contextlib.suppress(RedisError):
            found = [*_waiting(self.jobs), *_figures(counters.read(self.jobs.store))]
            self.jobs.store.cache.ping()
            up = 1.0
        told = "Whether the Redis of queue and cache answers (1) or not (0)."
        yield GaugeMetricFamily("afterimage_redis_up", told, up)
        yield from found


def _waiting(jobs: Jobs) -> Iterator[Metric]:
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        pipe.scard(jobs.waiting)  # also what a worker took from the queue and then fell
        pipe.lrange(jobs.queue.key, 0, _LOOKED_AT - 1)
        depth, head = pipe.execute()
        for job in head:
            pipe.hget(jobs.key(job.decode()), "created")
        created = [float(value) for value in pipe.execute() if value]
    age = max(time.time() - min(created), 0.0) if created else 0.0
    running = len(jobs.running)
    yield GaugeMetricFamily("afterimage_queue_depth", "Jobs that wait for a worker.", depth)
    yield GaugeMetricFamily(
        "afterimage_queue_oldest_age_seconds", "Seconds since the oldest of them was queued.", age
    )
    yield GaugeMetricFamily("afterimage_jobs_running", "Jobs that workers have begun.", running)
    workers = len(estimates.live_workers(jobs))
    yield GaugeMetricFamily("afterimage_workers", "Workers that live, busy or idle.", workers)
    memory = "Share of its maxmemory that the queue's Redis uses; 0 where it has none."
    yield GaugeMetricFamily("afterimage_queue_memory_ratio", memory, jobs.store.fullness())


def _figures(sums: counters.Counters) -> Iterator[Metric]:
    ended = CounterMetricFamily("afterimage_jobs_ended", "Jobs that ended.", labels=("status",))
    for name in (counters.SUCCEEDED, counters.FAILED, counters.CANCELED):
        ended.add_metric([name.partition(":")[2]], sums.get(name))
    yield ended
    lost = "Workers that fell silent over what they drew."
    yield CounterMetricFamily("afterimage_leases_lost", lost, sums.get(counters.LEASES_LOST))
    buckets, total = sums.eta_ratios
    error = "Measured over predicted time of a job (ratio; 1 is exact)."
    yield HistogramMetricFamily("afterimage_eta_error_ratio", error, buckets, total)
    yield from _model(sums.model_time)


def _model(workers: Mapping[str, tuple[float, float]]) -> Iterator[Metric]:
    label = ("worker",)
    spent = CounterMetricFamily("afterimage_model_seconds", "Seconds in the model.", labels=label)
    work = CounterMetricFamily("afterimage_megapixel_steps", "Megapixel-steps done.", labels=label)
    cost = GaugeMetricFamily(
        "afterimage_model_seconds_per_megapixel_step",
        "Seconds per megapixel-step, mean over a worker's jobs.",
        labels=label,
    )
    for worker, (seconds, steps) in workers.items():
        spent.add_metric([worker], seconds)
        work.add_metric([worker], steps)
        cost.add_metric([worker], seconds / steps)
    yield from (spent, work, cost)
