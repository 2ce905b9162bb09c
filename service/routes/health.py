"""Probes, unauthenticated."""

import contextlib

import anyio
import anyio.to_thread
from fastapi import APIRouter, Response

from service.deps import Own
from service.schemas import Health
from worker.queue.store import RedisError

router = APIRouter(tags=["health"])

PING_S = 2.0
"""How long Redis may take to answer before it counts as away: probes give up later."""
_PINGS = anyio.CapacityLimiter(4)
"""Threads that ask it, apart from those that requests need."""


@router.get("/livez", summary="Alive")
async def livez() -> Health:
    """The process answers."""
    return Health(status="ok", redis="unasked")


@router.get("/startupz", summary="Started")
async def startupz() -> Health:
    """The models are loaded: no connection is accepted before."""
    return Health(status="ok", redis="unasked")


@router.get("/readyz", summary="Ready")
async def readyz(own: Own, response: Response) -> Health:
    """The models are loaded; `degraded` while Redis is away and only instant decodes work."""
    response.headers["Cache-Control"] = "no-store"
    with anyio.move_on_after(PING_S), contextlib.suppress(RedisError):
        await anyio.to_thread.run_sync(own.store.ping, limiter=_PINGS, abandon_on_cancel=True)
        return Health(status="ok", redis="up")
    return Health(status="degraded", redis="down")
