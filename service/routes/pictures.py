"""`GET /v1/decodes/{id}/image` and `/preview`: the best available picture of a decode."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from models import tiers
from models.errors import ParameterError, WrongWeights
from service import drafts, image_response, problems, schemas, watching
from service.deps import (
    AcceptedFormat,
    ImageCaller,
    JobId,
    PreferHeader,
    ServicesDep,
    tier_query,
)
from service.problems import Conflict, JobNotFound, PictureGone
from worker.queue.records import DecodeRequest

router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

_RANKS = {name: rank for rank, name in enumerate(tiers.TIERS)}

_ROUTE: dict[str, Any] = {
    "summary": "Get the best available picture",
    "response_class": Response,
    "responses": {
        200: {"content": schemas.PICTURES, "description": "The best available picture."},
        202: {"model": schemas.Decode, "description": "No picture of `min_tier` is ready yet."},
        206: {"content": schemas.PICTURES, "description": "The part that `Range` asks for."},
        304: {"description": "The best available picture is the one that If-None-Match names."},
        **problems.responses(
            *problems.OF_AUTHENTICATION, *problems.OF_COMPUTATION, problems.QueueAway, JobNotFound,
            Conflict, PictureGone, ParameterError, WrongWeights, problems.NotAcceptable,
            problems.RangeNotSatisfiable,
        ),
    },
}  # fmt: skip


@router.get("/{id}/image", **_ROUTE)
async def picture(
    services: ServicesDep,
    caller: ImageCaller,
    id: JobId,
    request: Request,
    format: AcceptedFormat,
    prefer: PreferHeader,
    min_tier: Annotated[
        str, tier_query("The lowest tier to accept; the response is 202 until it is ready.")
    ] = "instant",
    realism: Annotated[
        float,
        Query(ge=0, le=1, description="Blends the instant picture (0) with the finished one (1)."),
    ] = 1.0,
) -> Response:
    """The finished picture or, until it is ready, the instant picture; the header
    `X-Afterimage-Tier` names its tier."""
    tiers.find(min_tier)
    state = await watching.load(services, id, caller.name)
    if min_tier != "instant" and prefer.wait_s:
        await watching.wait_until_ended(services, request, id, prefer.wait_s)
        state = await watching.load(services, id, caller.name)
    watching.check_kept(state)
    if _RANKS[min_tier] > _rank(state.decode):
        raise Conflict(f"decode {id} has tier {state.decode.tier} and will not reach {min_tier}")
    if state.status != "succeeded" and min_tier != "instant":
        return await watching.pending_response(services, state)
    if state.status == "succeeded" and realism > 0:
        file = await drafts.finished_picture(services, state.decode, format, realism)
        if file is not None:
            headers = {"X-Afterimage-Realism": f"{realism:g}"}
            return image_response.picture(services, request, file, format, state.decode, headers)
    b = await drafts.stored_bitstream(services, state.decode)
    draft = await drafts.draft(services, state.decode, b, format)
    return image_response.picture(services, request, draft.data, format, None)


@router.get(
    "/{id}/preview",
    summary="Get the latest preview",
    response_class=Response,
    responses={
        200: {"content": {"image/webp": {"schema": schemas.BINARY}}, "description": "A WebP file."},
        **problems.responses(
            *problems.OF_AUTHENTICATION, JobNotFound, ParameterError, problems.QueueAway
        ),
    },
)
async def preview(services: ServicesDep, caller: ImageCaller, id: JobId) -> Response:
    """The latest intermediate picture of a running decode; made only while its events are read."""
    state = await watching.load(services, id, caller.name)
    file = await anyio.to_thread.run_sync(services.store.preview, id)
    if file is None:
        raise JobNotFound(f"decode {id} has no preview")
    headers = {"Cache-Control": "no-store", **image_response.provenance_headers(state.decode)}
    return Response(file, 200, headers, "image/webp")


def _rank(decode: DecodeRequest) -> int:
    """The rank of the best tier with the decode's settings, which may not be the tier it names."""
    same = (t.name for t in tiers.TIERS.values() if t.settings == decode.settings)
    return max(_RANKS[name] for name in (decode.tier, *same))
