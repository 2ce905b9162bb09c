"""`/v1/decodes`: the instant picture at once, the diffusion picture when it is ready."""

import hashlib
import time
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from models import bitstream, codec, image, tiers
from models.bitstream import Bitstream
from models.errors import ParameterError
from models.tiers import Settings
from service import problems, schemas
from service.deps import Body, Own, State
from service.problems import JobNotFound
from worker.jobs import Decode, JobState

router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

DRAFT_CACHE = "max-age=0, stale-while-revalidate=60"
FINAL_CACHE = "max-age=31536000, immutable"

_PNG: dict[str, Any] = {"image/png": {"schema": schemas.BINARY}}
_BITSTREAM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A bitstream: `.msh`, or an image file of CompressAI's `codec.py`.",
        "content": {
            "application/octet-stream": {"schema": schemas.BINARY},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": schemas.BINARY}}
            },
        },
    }
}


@router.post(
    "",
    summary="Decode a bitstream",
    response_class=Response,
    openapi_extra=_BITSTREAM,
    responses={
        200: {
            "content": _PNG,
            "description": "The instant picture, or the finished one where it is cached. For a "
            "diffusion tier, `Location` names the decode and `Link` its picture.",
            "headers": {
                "Location": {"schema": {"type": "string"}, "example": "/v1/decodes/3f2b8c5d…"},
                "X-Afterimage-Tier": {"schema": {"type": "string"}, "example": "instant"},
            },
        },
        **problems.responses(400, 413, 415, 422, 503),
    },
)
async def decode(
    own: Own,
    data: Body,
    tier: Annotated[
        str, Query(examples=["perceptual"], description="See `/v1/tiers`.")
    ] = "instant",
    seed: Annotated[int, Query(ge=0, le=tiers.MAX_SEED)] = 0,
    steps: Annotated[int | None, Query(ge=1, le=tiers.MAX_STEPS)] = None,
    eta: Annotated[float | None, Query(ge=0, le=1)] = None,
    gamma: Annotated[float | None, Query(ge=0, le=1)] = None,
    sampler: Annotated[tiers.Sampler | None, Query()] = None,
    guidance: Annotated[
        float | None,
        Query(
            ge=0, le=tiers.MAX_GUIDANCE, description="Autoguidance; 1 is off, else twice the cost."
        ),
    ] = None,
) -> Response:
    """Decode a bitstream.

    Answers with the instant picture at once. A diffusion tier also queues its picture, under an id
    that is the digest of the request's content: repeated, it is the same job, and once that is
    done the finished picture comes back at once.
    """
    chosen = tiers.find(tier)
    began = time.perf_counter()
    b = bitstream.parse(data, own.settings.max_pixels)
    if chosen.settings is None:
        return await _draft(own, b, began, {})
    settings = tiers.vary(
        chosen.settings, sampler=sampler, steps=steps, eta=eta, gamma=gamma, guidance=guidance
    )
    _check_work(own, b, settings)
    request = Decode(
        bitstream.digest(data), chosen.name, settings, seed, own.library.codec_id(b),
        own.decoder_weights, b.quality, b.width, b.height,
    )  # fmt: skip
    location = f"/v1/decodes/{request.id}"
    headers = {"Location": location, "Link": f'<{location}/image>; rel="upgrade"'}
    finished = await anyio.to_thread.run_sync(own.store.picture, request.id)
    if finished is not None:
        return _picture(finished, chosen.name, FINAL_CACHE, {**headers, "X-Cache": "hit"})
    draft = await _kept_draft(own, request, b, began, {**headers, "X-Cache": "miss"})
    # only what decodes is queued
    await anyio.to_thread.run_sync(own.jobs.submit, request, data)
    return draft


@router.get("/{id}", summary="Where a decode stands", responses=problems.responses(404, 503))
async def status(own: Own, id: str) -> schemas.Decode:
    """Where a decode stands: status, steps done, place in the queue."""

    def look() -> schemas.Decode:
        state = _find(own, id)
        position = own.jobs.position(id) if state.status == "queued" else None
        return schemas.Decode.of(state, position)

    return await anyio.to_thread.run_sync(look)


@router.get(
    "/{id}/image",
    summary="The best picture there is",
    response_class=Response,
    responses={
        200: {"content": _PNG, "description": "The best picture there is; see X-Afterimage-Tier."},
        304: {"description": "The picture that If-None-Match names is still the best."},
        **problems.responses(404, 503),
    },
)
async def picture(own: Own, id: str, request: Request) -> Response:
    """The finished picture, or the instant one while there is none."""
    state = await anyio.to_thread.run_sync(_find, own, id)
    finished = await anyio.to_thread.run_sync(own.store.picture, id)
    if finished is not None:
        answer = _picture(finished, state.decode.tier, FINAL_CACHE, {})
    else:
        data = await anyio.to_thread.run_sync(own.store.bitstream, state.decode.digest)
        if data is None:
            raise JobNotFound(f"the bitstream of decode {id} is no longer kept")
        b = bitstream.parse(data, own.settings.max_pixels)
        answer = await _kept_draft(own, state.decode, b, time.perf_counter(), {})
    known = {
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("if-none-match", "").split(",")
    }
    if answer.headers["etag"] in known or "*" in known:
        keep = {k: v for k, v in answer.headers.items() if k in {"etag", "cache-control"}}
        return Response(status_code=304, headers=keep)
    return answer


async def _kept_draft(
    own: State, decode: Decode, b: Bitstream, began: float, headers: dict[str, str]
) -> Response:
    """The instant picture from the cache; computed, and kept there, where it is not."""
    name = decode.digest, decode.codec
    kept = await anyio.to_thread.run_sync(own.store.draft, *name)
    if kept is not None:
        return _picture(kept, "instant", DRAFT_CACHE, headers)
    answer = await _draft(own, b, began, headers)
    await anyio.to_thread.run_sync(own.store.put_draft, *name, bytes(answer.body))
    return answer


def _check_work(own: State, b: Bitstream, settings: Settings) -> None:
    limit = own.settings.max_megapixel_steps
    work = b.width * b.height / 1e6 * settings.calls
    if work > limit:
        raise ParameterError(f"{work:.0f} megapixel-steps; the limit is {limit:.0f}: ask for fewer")


def _find(own: State, id: str) -> JobState:
    state = own.jobs.get(id)
    if state is None:
        raise JobNotFound(f"there is no decode {id}")
    return state


async def _draft(own: State, b: Bitstream, began: float, headers: dict[str, str]) -> Response:
    """The instant picture, computed off the event loop."""

    def compute() -> tuple[bytes, str]:
        marks = [began, time.perf_counter()]
        used = own.library.codec(b)
        latents = used.latents(b)
        marks.append(time.perf_counter())
        x_hat = used.synthesis(latents.y_hat)
        marks.append(time.perf_counter())
        png = image.write(codec.to_pixels(codec.crop(x_hat, b.height, b.width)), "png")
        marks.append(time.perf_counter())
        names = ("parse", "entropy", "g_s", "encode")
        spans = zip(names, marks, marks[1:], strict=False)
        return png, ", ".join(f"{n};dur={(y - x) * 1e3:.1f}" for n, x, y in spans)

    png, timing = await anyio.to_thread.run_sync(compute, limiter=own.cores)
    return _picture(png, "instant", DRAFT_CACHE, {**headers, "Server-Timing": timing})


def _picture(png: bytes, tier: str, cache: str, headers: dict[str, str]) -> Response:
    own = {
        "ETag": f'"{hashlib.sha256(png).hexdigest()}"',
        "Cache-Control": cache,
        "X-Afterimage-Tier": tier,
        "X-Content-Type-Options": "nosniff",
        **headers,
    }
    if tier != "instant":
        own["X-Afterimage-Note"] = "synthesised detail"
    return Response(png, 200, own, "image/png")
