"""Liveness, start-up and readiness probes, without authentication."""

import contextlib

import anyio
import anyio.to_thread
from fastapi import APIRouter, Response

from service.deps import ServicesDep
from service.schemas import Health
from worker.queue.store import RedisError

router = APIRouter(tags=["health"])

PING_S = 2.0
"""Seconds after which a Redis that does not respond counts as down; shorter than the timeouts of
usual probes."""
_PING_THREADS = anyio.CapacityLimiter(4)
"""Threads that ping Redis; separate, so that an unresponsive Redis does not block requests."""


@router.get("/livez", summary="Alive")
async def livez() -> Health:
    """The process responds. Redis is not checked."""
    return Health(status="ok", redis="unasked")


@router.get("/startupz", summary="Started")
async def startupz() -> Health:
    """The models are loaded. Before that, the server accepts no connections."""
    return Health(status="ok", redis="unasked")


@router.get("/readyz", summary="Ready")
async def readyz(services: ServicesDep, response: Response) -> Health:
    """The models are loaded. The status is `degraded` while Redis is down: only instant decodes
    work then."""
    response.headers["Cache-Control"] = "no-store"
    with anyio.move_on_after(PING_S), contextlib.suppress(RedisError):
        await anyio.to_thread.run_sync(
            services.store.ping, limiter=_PING_THREADS, abandon_on_cancel=True
        )
        return Health(status="ok", redis="up")
    return Health(status="degraded", redis="down")
