"""Prometheus metrics of this API process, and the port that may serve them alone."""

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

from service.collector import Queue
from worker.queue.jobs import Jobs

ShedReason = Literal["line", "bodies", "backlog", "memory", "timeout", "redis"]
"""Why a request got 503 or 504: the line for the cores, the memory for bodies, the queue's backlog,
its memory, the request's deadline, Redis away."""

_REQUESTS = Histogram(
    "afterimage_request_duration_seconds",
    "Seconds from a request's start to its answer's end, less what a new decode was asked to wait.",
    ("route", "method", "status"), registry=None,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
_STAGES = Histogram(
    "afterimage_stage_duration_seconds", "Seconds of an instant decode's stages.", ("stage",),
    registry=None, buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)  # fmt: skip
_CACHE = Counter(
    "afterimage_cache_lookups", "Looks for a picture that may be kept.", ("cache", "result"),
    registry=None,
)  # fmt: skip
_SHED = Counter(
    "afterimage_shed_requests", "Requests that were refused or given up.", ("reason",),
    registry=None,
)  # fmt: skip
_RATE_LIMITED = Counter(
    "afterimage_rate_limited_requests", "Requests beyond their caller's quota.", registry=None
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


def request(route: str, method: str, status: int, seconds: float) -> None:
    """A request ended; methods that no route has count as one."""
    known = method if method in _METHODS else "other"
    _REQUESTS.labels(route, known, f"{status // 100}xx").observe(seconds)


def stages(spans_ms: Mapping[str, float]) -> None:
    """The stages of an instant decode (queue, entropy, g_s, encode), in ms as in Server-Timing."""
    for stage, ms in spans_ms.items():
        _STAGES.labels(stage).observe(ms / 1e3)


def cache(name: Literal["draft", "picture"], hit: bool) -> None:
    """A picture was looked for."""
    _CACHE.labels(name, "hit" if hit else "miss").inc()


def shed(reason: ShedReason) -> None:
    """A request was refused, or given up."""
    _SHED.labels(reason).inc()


def rate_limited() -> None:
    """A caller's quota was used up."""
    _RATE_LIMITED.inc()


def registry(jobs: Jobs) -> CollectorRegistry:
    """Everything that the page shows."""
    made = CollectorRegistry()
    for metric in (_REQUESTS, _STAGES, _CACHE, _SHED, _RATE_LIMITED, Queue(jobs)):
        made.register(metric)
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    return made


def serve(port: int, jobs: Jobs, host: str) -> Callable[[], None]:
    """Show the page on a port of its own; the returned function ends that.

    Raises `OSError` where the port is taken.
    """
    server, thread = start_http_server(port, host, registry(jobs))

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
