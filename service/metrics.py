"""Prometheus metrics of this API process, and their optional separate port."""

from collections.abc import Callable, Mapping
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from service.collector import QueueCollector
from worker.queue.jobs import Jobs

ShedReason = Literal["line", "bodies", "backlog", "memory", "timeout", "redis", "connections"]
"""Why a request got 503 or 504: full waiting line of decodes or encodes, used up memory for
bodies, long backlog of the queue, full memory of the queue, deadline of the request, Redis
unavailable, too many connections."""

_REQUESTS = Histogram(
    "afterimage_request_duration_seconds",
    "Seconds until a response is sent, without the time a new decode waited by `Prefer: wait`.",
    ("route", "method", "status"), registry=None,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
_STAGES = Histogram(
    "afterimage_stage_duration_seconds", "Seconds that the stages of an instant decode take.",
    ("stage",), registry=None,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)  # fmt: skip
_CACHE = Counter(
    "afterimage_cache_lookups", "Lookups of cached pictures.", ("cache", "result"),
    registry=None,
)  # fmt: skip
_SHED = Counter(
    "afterimage_shed_requests", "Requests refused or timed out.", ("reason",),
    registry=None,
)  # fmt: skip
_RATE_LIMITED = Counter(
    "afterimage_rate_limited_requests",
    "Requests refused because of their caller's quota.",
    registry=None,
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


def request(route: str, method: str, status: int, seconds: float) -> None:
    """Observe a request that has ended; unknown methods are counted together as `other`."""
    label = method if method in _METHODS else "other"
    _REQUESTS.labels(route, label, f"{status // 100}xx").observe(seconds)


def stages(spans_ms: Mapping[str, float]) -> None:
    """Observe the stages of an instant decode (queue, entropy, g_s, encode), in milliseconds."""
    for stage, ms in spans_ms.items():
        _STAGES.labels(stage).observe(ms / 1e3)


def cache(name: Literal["draft", "picture"], hit: bool) -> None:
    """Count a cache lookup."""
    _CACHE.labels(name, "hit" if hit else "miss").inc()


def shed(reason: ShedReason) -> None:
    """Count a request that was refused or timed out."""
    _SHED.labels(reason).inc()


def rate_limited() -> None:
    """Count a request that exceeded its caller's quota."""
    _RATE_LIMITED.inc()


def registry(jobs: Jobs) -> CollectorRegistry:
    """Return a registry of all metrics: of this process, of the queue and of workers."""
    registry = CollectorRegistry()
    for metric in (_REQUESTS, _STAGES, _CACHE, _SHED, _RATE_LIMITED, QueueCollector(jobs)):
        registry.register(metric)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def serve(port: int, jobs: Jobs, host: str) -> Callable[[], None]:
    """Serve the metrics on a separate port; return a function that stops the server.

    Raises `OSError` if the port is in use.
    """
    server, thread = start_http_server(port, host, registry(jobs))

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
