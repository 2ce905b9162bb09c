"""`GET /v1/decodes/{id}/image` and `/preview`: the best available picture of a decode."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from models import tiers
from models.errors import ParameterError, WrongWeights
from service import drafts, image_response, negotiate, problems, schemas, watching
from service.deps import (
    ONLY_KNOWN_ON_LINKS,
    AcceptHeader,
    ImageCaller,
    JobId,
    PreferHeader,
    ServicesDep,
    tier_query,
)
from service.problems import Conflict, JobNotFound, PictureGone
from worker.queue.records import DecodeRequest

router = APIRouter(prefix="/v1/decodes", tags=["decodes"], dependencies=[ONLY_KNOWN_ON_LINKS])

_RANKS = {name: rank for rank, name in enumerate(tiers.TIERS)}

_ROUTE: dict[str, Any] = {
    "summary": "Get the best available picture",
    "response_class": Response,
    "responses": {
        200: {"content": schemas.PICTURES, "description": "The best available picture."},
        202: {"model": schemas.Decode, "description": "No picture of `min_tier` is ready yet."},
        206: {"content": schemas.PICTURES, "description": "The part that `Range` asks for."},
        304: {"description": "`If-None-Match` names the ETag of the best available picture."},
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
    accept: AcceptHeader,
    prefer: PreferHeader,
    min_tier: Annotated[
        str,
        tier_query("Lowest acceptable tier; until such a picture is ready, the response is 202."),
    ] = "instant",
    realism: Annotated[
        float,
        Query(ge=0, le=1, description="Blends the instant picture (0) with the finished one (1)."),
    ] = 1.0,
) -> Response:
    """The finished picture or, until it is ready, the instant picture; the header
    `X-Afterimage-Tier` names its tier."""
    tiers.find(min_tier)
    state = await watching.load_and_renew(services, id, caller)
    if min_tier != "instant" and prefer.wait_s:
        await watching.wait_until_ended(services, request, id, prefer.wait_s)
        state = await watching.load_and_renew(services, id, caller)
    watching.check_kept(state)
    if _RANKS[min_tier] > _rank(state.decode):
        raise Conflict(
            f"min_tier is {min_tier}, but the picture of decode {id} will have the lower tier "
            f"{state.decode.tier}; choose that tier or a lower one"
        )
    if state.status != "succeeded" and min_tier != "instant":
        return await watching.pending_response(services, state)
    format = negotiate.picture_format(accept, state.decode.width, state.decode.height)
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
async def preview(
    services: ServicesDep,
    caller: ImageCaller,
    id: JobId,
    step: Annotated[str | None, Query(include_in_schema=False)] = None,
) -> Response:
    """The latest intermediate picture of a running decode; made only while its events are read."""
    # `step` makes the address in each event a new one, so that browsers load the picture again
    state = await watching.load_and_renew(services, id, caller)
    file = await anyio.to_thread.run_sync(services.store.preview, id)
    if file is None:
        raise JobNotFound(
            f"decode {id} has no preview; previews are made only while its events are read"
        )
    headers = {"Cache-Control": "no-store", **image_response.provenance_headers(state.decode)}
    return Response(file, 200, headers, "image/webp")


def _rank(decode: DecodeRequest) -> int:
    """The rank of the decode's tier, or of the highest tier with the same settings.

    A request may change the settings of its tier to those of a higher one.
    """
    same = (t.name for t in tiers.TIERS.values() if t.settings == decode.settings)
    return max(_RANKS[name] for name in (decode.tier, *same))
