"""Prometheus collector of the queue's state and of the counters that workers keep in Redis."""

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

from service import batch_metrics
from worker.queue import counters, workers
from worker.queue.jobs import Jobs
from worker.queue.line import Waiting
from worker.queue.records import PRIORITIES
from worker.queue.store import RedisError

_HEAD = 16
"""Number of jobs at the front of each queue among which the oldest is looked for. Jobs that were
queued again are at the front too, so the first job need not be the oldest."""


class QueueCollector(Collector):
    """Reads Redis at every scrape.

    `afterimage_redis_up` is 0 while the queue's or the cache's Redis is down. The other metrics
    need the queue's Redis only, and are missing while that is down.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def describe(self) -> list[Metric]:
        """Return no metrics, so that registering the collector does not read Redis."""
        return []

    def collect(self) -> Iterator[Metric]:
        families: list[Metric] = []
        up = 0.0
        with contextlib.suppress(RedisError):
            sums = counters.read(self.jobs.store)
            families = [*_queue(self.jobs), *_counters(sums)]
            families += batch_metrics.families(self.jobs.store, sums)
            self.jobs.store.cache.ping()
            up = 1.0
        text = "Whether both Redis stores, queue and cache, respond (1) or not (0)."
        yield GaugeMetricFamily("afterimage_redis_up", text, up)
        yield from families


def _queue(jobs: Jobs) -> Iterator[Metric]:
    with jobs.store.queue.pipeline(transaction=False) as pipe:
        pipe.scard(jobs.waiting)  # includes jobs that a worker took before it crashed
        depth = pipe.execute()[0]
        depths = jobs.line.depths()
        for waiting in depths:
            if waiting.priority == "interactive":
                pipe.lrange(jobs.line.queue("interactive", waiting.caller).key, 0, _HEAD - 1)
        for job in [job for head in pipe.execute() for job in head]:
            pipe.hget(jobs.key(job.decode()), "created")
        created = [float(value) for value in pipe.execute() if value]
    age = max(time.time() - min(created), 0.0) if created else 0.0
    running, live = len(jobs.running), len(workers.names(jobs))
    yield GaugeMetricFamily("afterimage_queue_depth", "Jobs waiting for a worker.", depth)
    yield GaugeMetricFamily(
        "afterimage_queue_oldest_age_seconds",
        "Seconds since the oldest waiting interactive job was queued.",
        age,
    )
    yield from _priorities(depths, jobs.now())
    yield GaugeMetricFamily("afterimage_jobs_running", "Jobs being run by workers.", running)
    yield GaugeMetricFamily("afterimage_workers", "Live workers, busy or idle.", live)
    memory = "Used fraction of the maxmemory of the queue's Redis; 0 without maxmemory."
    yield GaugeMetricFamily("afterimage_queue_memory_ratio", memory, jobs.store.fullness())


def _priorities(depths: Mapping[Waiting, int], now: float) -> Iterator[Metric]:
    """Metrics of the waiting callers, by priority."""
    label = ("priority",)
    count = GaugeMetricFamily("afterimage_queue_jobs", "Jobs in the queues.", labels=label)
    callers = GaugeMetricFamily(
        "afterimage_queue_callers", "Callers whose jobs wait for a worker.", labels=label
    )
    unserved = GaugeMetricFamily(
        "afterimage_queue_unserved_seconds",
        "Longest time for which no worker has taken a job of a waiting caller.",
        labels=label,
    )
    for priority in PRIORITIES:
        waiting = {w: jobs for w, jobs in depths.items() if w.priority == priority}
        count.add_metric([priority], sum(waiting.values()))
        callers.add_metric([priority], len(waiting))
        since = min((w.since for w in waiting if w.since), default=now)
        unserved.add_metric([priority], max(now - since, 0.0))
    yield from (count, callers, unserved)


def _counters(sums: counters.Counters) -> Iterator[Metric]:
    ended = CounterMetricFamily("afterimage_jobs_ended", "Jobs that ended.", labels=("status",))
    for name in (counters.SUCCEEDED, counters.FAILED, counters.CANCELED):
        ended.add_metric([name.partition(":")[2]], sums.get(name))
    yield ended
    lost = "Workers whose heartbeat stopped during a job."
    yield CounterMetricFamily("afterimage_leases_lost", lost, sums.get(counters.LEASES_LOST))
    targets = CounterMetricFamily(
        "afterimage_targets",
        "Targets in object stores: written, failed, or to be retried because the store was away.",
        labels=("status",),
    )
    for status in ("written", "failed", "retried"):
        targets.add_metric([status], sums.get(counters.TARGETS + status))
    yield targets
    text = "Finished pictures that could not be written to AFTERIMAGE_RESULTS."
    yield CounterMetricFamily("afterimage_results_lost", text, sums.get(counters.RESULTS_LOST))
    buckets, total = sums.eta_ratios
    text = "Measured duration of a job divided by the predicted duration; 1 is exact."
    yield HistogramMetricFamily("afterimage_eta_error_ratio", text, buckets, total)
    yield from _model(sums.model_time)


def _model(workers: Mapping[str, tuple[float, float]]) -> Iterator[Metric]:
    label = ("worker",)
    spent = CounterMetricFamily(
        "afterimage_model_seconds", "Seconds spent in the model.", labels=label
    )
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
