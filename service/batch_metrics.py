"""Metrics of batches, read from Redis at every scrape."""

import time
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker.queue.batches.leases import ITEMS
from worker.queue.batches.records import STATES
from worker.queue.batches.store import Batches
from worker.queue.counters import Counters
from worker.queue.store import Store


def families(store: Store, sums: Counters) -> Iterator[Metric]:
    """The items of running batches by status, those that have ended, and the time without any."""
    running = Batches(store).running()
    gauge = GaugeMetricFamily(
        "afterimage_batch_items", "Items of running batches, by status.", labels=("status",)
    )
    for status in STATES:
        gauge.add_metric([status], sum(batch.counts[status] for batch in running))
    yield gauge
    ended = CounterMetricFamily(
        "afterimage_batch_items_ended", "Items of batches that ended.", labels=("status",)
    )
    for status in ("succeeded", "skipped", "failed", "canceled"):
        ended.add_metric([status], sums.get(ITEMS + status))
    yield ended
    yield GaugeMetricFamily("afterimage_batches_running", "Batches not ended.", len(running))
    oldest = min((batch.progressed for batch in running), default=None)
    yield GaugeMetricFamily(
        "afterimage_batch_stalled_seconds",
        "Longest time since an item of a running batch ended, or since its submission.",
        0.0 if oldest is None else max(time.time() - oldest, 0.0),
    )
