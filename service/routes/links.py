"""`POST /v1/decodes/{id}/links`: a signed URL of a picture, usable without an API key."""

import time
from typing import Annotated
from urllib.parse import urlencode

import anyio.to_thread
from fastapi import APIRouter, Query

from models import tiers
from models.errors import ParameterError
from service import prefix, problems, schemas, signed_urls, watching
from service.deps import ONLY_KNOWN, DecodeCaller, JobId, ServicesDep, tier_query
from service.problems import Conflict, JobNotFound
from worker.queue.store import PICTURE_TTL_S

router = APIRouter(prefix="/v1/decodes", tags=["decodes"], dependencies=[ONLY_KNOWN])

MAX_LINK_S = PICTURE_TTL_S
"""Longest validity of a link: the picture expires after that time."""


@router.post(
    "/{id}/links",
    status_code=201,
    summary="Share a picture",
    responses=problems.responses(
        *problems.OF_AUTHENTICATION, JobNotFound, Conflict, ParameterError, problems.QueueAway
    ),
)
async def share(
    services: ServicesDep,
    caller: DecodeCaller,
    id: JobId,
    seconds: Annotated[
        int, Query(ge=1, le=MAX_LINK_S, description="Seconds until the link expires.")
    ] = 3600,
    min_tier: Annotated[str, tier_query("`min_tier` of the picture's URL.")] = "instant",
    realism: Annotated[
        float, Query(ge=0, le=1, description="`realism` of the picture's URL.")
    ] = 1.0,
) -> schemas.Link:
    """Create a URL of the picture that works without an API key until it expires."""
    tiers.find(min_tier)
    if services.link_secret is None:
        raise Conflict("signed links are disabled; the operator can set AFTERIMAGE_LINK_SECRET")
    await anyio.to_thread.run_sync(watching.find, services, id, caller)
    query = urlencode({"min_tier": min_tier, "realism": realism})
    expires = int(time.time()) + seconds
    url = signed_urls.sign(services.link_secret, f"/v1/decodes/{id}/image", query, expires)
    return schemas.Link.until(prefix.public(url), expires)
