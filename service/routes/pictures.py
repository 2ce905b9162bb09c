"""`GET /v1/decodes/{id}/image`: the best picture there is, in the format that is liked best."""

import contextlib
import math
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from models import image, tiers
from models.codec import bitstream
from models.codec.bitstream import Bitstream
from models.errors import ParameterError, WrongWeights
from models.image import OutputFormat
from models.library import provenance
from service import image_response, problems, schemas
from service.deps import Accepted, JobId, Own, Preferred, State, Viewing, one_of_tiers
from service.instant import Drawn
from service.problems import Conflict, JobNotFound, PictureGone
from service.routes import progress
from worker.queue.records import Decode, JobState
from worker.queue.store import RedisError

router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

_RANKS = {name: rank for rank, name in enumerate(tiers.TIERS)}


_ROUTE: dict[str, Any] = {
    "summary": "The best picture there is",
    "response_class": Response,
    "responses": {
        200: {"content": schemas.PICTURES, "description": "The best picture there is."},
        202: {"model": schemas.Decode, "description": "`min_tier` is not reached yet."},
        206: {"content": schemas.PICTURES, "description": "The part that `Range` asks for."},
        304: {"description": "The picture that If-None-Match names is still the best."},
        **problems.responses(
            *problems.OF_KEYS, *problems.OF_LINES, problems.QueueAway, JobNotFound, Conflict,
            PictureGone, ParameterError, WrongWeights, problems.NotAcceptable,
            problems.RangeNotSatisfiable,
        ),
    },
}  # fmt: skip


@router.head("/{id}/image", name="picture_head", **_ROUTE)
@router.get("/{id}/image", **_ROUTE)
async def picture(
    own: Own,
    caller: Viewing,
    id: JobId,
    request: Request,
    format: Accepted,
    prefer: Preferred,
    min_tier: Annotated[
        str, one_of_tiers("At least this tier: 202 while it is pending.")
    ] = "instant",
    realism: Annotated[
        float,
        Query(ge=0, le=1, description="0: the instant picture; 1: the tier's. Nothing is redrawn."),
    ] = 1.0,
) -> Response:
    """The finished picture, or the instant one while there is none; `X-Afterimage-Tier` says."""
    tiers.find(min_tier)
    state = await progress.look(own, id, caller.name)
    if min_tier != "instant" and prefer.wait_s:
        await progress.until_ended(own, request, id, prefer.wait_s)
        state = await progress.look(own, id, caller.name)
    if state.status == "expired":
        raise PictureGone(f"the picture of decode {id} is no longer kept; retry makes it again")
    if _RANKS[min_tier] > _rank(state.decode):
        raise Conflict(f"decode {id} draws {state.decode.tier}, not {min_tier}")
    if state.status != "succeeded" and min_tier != "instant":
        return await pending(own, state)
    if state.status == "succeeded" and realism > 0:
        file = await finished(own, state.decode, format, realism)
        if file is not None:
            shown = {"X-Afterimage-Realism": f"{realism:g}"}
            return image_response.picture(request, file, format, state.decode, shown)
    b = await _bitstream(own, state.decode)
    drawn = await draft(own, state.decode, b, format)
    return image_response.picture(request, drawn.file, format, None)


@router.get(
    "/{id}/preview",
    summary="The estimate so far",
    response_class=Response,
    responses={
        200: {"content": {"image/webp": {"schema": schemas.BINARY}}, "description": "A WebP file."},
        **problems.responses(*problems.OF_KEYS, JobNotFound, ParameterError, problems.QueueAway),
    },
)
async def preview(own: Own, caller: Viewing, id: JobId) -> Response:
    """The last estimate of a decode that is being drawn while its events are read."""
    state = await progress.look(own, id, caller.name)
    file = await anyio.to_thread.run_sync(own.store.preview, id)
    if file is None:
        raise JobNotFound(f"there is no preview of decode {id}")
    headers = {"Cache-Control": "no-store", **image_response.drawn(state.decode)}
    return Response(file, 200, headers, "image/webp")


async def finished(
    own: State, decode: Decode, format: OutputFormat, alpha: float = 1.0
) -> bytes | None:
    """The finished picture's file at realism `alpha`, where it is kept."""
    png = await anyio.to_thread.run_sync(own.store.picture, decode.id)
    if png is None or (format == "png" and alpha == 1):
        return png
    b = None if alpha == 1 else await _bitstream(own, decode)

    def remake() -> Drawn:
        pixels = image.read(png, own.settings.max_pixels)
        if b is not None:
            pixels = own.library.at_realism(b, pixels, alpha)
        text = provenance(
            decode.tier, decode.settings, decode.seed, decode.codec, decode.decoder, alpha
        )
        return Drawn(image.write(pixels, format, text))

    return (await own.instant.once((decode.id, format, alpha), remake)).file


async def draft(own: State, decode: Decode, b: Bitstream, format: OutputFormat) -> Drawn:
    """The instant picture, from the cache or computed and kept there; without one, computed."""
    name = decode.digest, decode.codec, format
    with contextlib.suppress(RedisError):
        kept = await anyio.to_thread.run_sync(own.store.draft, *name)
        if kept is not None:
            return Drawn(kept)
    drawn = await own.instant.picture(b, decode.digest, format)
    with contextlib.suppress(RedisError):
        await anyio.to_thread.run_sync(own.store.put_draft, *name, drawn.file)
    return drawn


async def _bitstream(own: State, decode: Decode) -> Bitstream:
    data = await anyio.to_thread.run_sync(own.store.bitstream, decode.digest)
    if data is None:
        raise JobNotFound(f"the bitstream of decode {decode.id} is no longer kept")
    b = bitstream.parse(data, own.settings.max_pixels)
    if own.library.codec_id(b) != decode.codec:
        raise WrongWeights(f"decode {decode.id} is of other weights than are here now")
    return b


def _rank(decode: Decode) -> int:
    """Of the best tier that has the decode's settings: one may be asked for by another's name."""
    same = (t.name for t in tiers.TIERS.values() if t.settings == decode.settings)
    return max(_RANKS[name] for name in (decode.tier, *same))


async def pending(own: State, state: JobState) -> Response:
    """202 and the job's state; raises `Conflict` where its picture will not come."""
    if state.status in {"failed", "canceled"}:
        raise Conflict(f"decode {state.id} is {state.status}: {state.error or 'retry makes it'}")
    shown = await anyio.to_thread.run_sync(progress.view, own, state.id)
    headers = {"Retry-After": str(math.ceil(shown.eta_s or 1)), "Cache-Control": "no-store"}
    return JSONResponse(shown.model_dump(mode="json"), 202, headers)
