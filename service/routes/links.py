"""`POST /v1/decodes/{id}/links`: a signed URL of a picture, for those who have no API key."""

import time
from typing import Annotated
from urllib.parse import urlencode

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from models import tiers
from models.errors import ParameterError
from service import problems, schemas, signed_urls
from service.deps import Decoding, JobId, Own, one_of_tiers
from service.problems import Conflict, JobNotFound
from service.routes import progress
from worker.queue.store import PICTURE_TTL_S

router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

MAX_LINK_S = PICTURE_TTL_S
"""A link of a picture that is no longer kept would show nothing."""


@router.post(
    "/{id}/links",
    status_code=201,
    summary="Share a picture",
    responses=problems.responses(
        *problems.OF_KEYS, JobNotFound, Conflict, ParameterError, problems.QueueAway
    ),
)
async def share(
    own: Own,
    caller: Decoding,
    request: Request,
    id: JobId,
    seconds: Annotated[int, Query(ge=1, le=MAX_LINK_S, description="How long it is valid.")] = 3600,
    min_tier: Annotated[str, one_of_tiers("As of the picture.")] = "instant",
    realism: Annotated[float, Query(ge=0, le=1, description="As of the picture.")] = 1.0,
) -> schemas.Link:
    """A URL that whoever holds it may GET, without a key, until it expires."""
    tiers.find(min_tier)
    secret: bytes | None = request.app.state.link_secret
    if secret is None:
        raise Conflict("this service signs no links: it has no AFTERIMAGE_LINK_SECRET")
    await anyio.to_thread.run_sync(progress.view, own, id)
    query = urlencode({"min_tier": min_tier, "realism": realism})
    expires = int(time.time()) + seconds
    return schemas.Link.until(
        signed_urls.sign(secret, f"/v1/decodes/{id}/image", query, expires), expires
    )
