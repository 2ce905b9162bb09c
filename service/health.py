"""Probes, unauthenticated."""

import anyio.to_thread
from fastapi import APIRouter, Response

from service.deps import Own
from service.schemas import Health
from worker.store import RedisError

router = APIRouter(tags=["health"])


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
    try:
        await anyio.to_thread.run_sync(own.store.ping)
    except RedisError:
        return Health(status="degraded", redis="down")
    return Health(status="ok", redis="up")
