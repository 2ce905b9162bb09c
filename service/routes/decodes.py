"""`POST /v1/decodes` and `PUT /v1/decodes/{id}`: decode a bitstream, and queue a job for it."""

import time
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from models import errors, tiers
from models.codec import bitstream
from models.errors import ParameterError
from models.image import MEDIA_TYPES
from service import (
    idempotency,
    image_response,
    negotiate,
    object_writes,
    problems,
    schemas,
    submission,
)
from service.deps import (
    ONLY_KNOWN,
    AcceptHeader,
    DecodeCaller,
    JobId,
    PreferHeader,
    ServicesDep,
    tier_query,
)
from service.drafts import read_bitstream
from service.object_params import DecodeInput, PictureTargetDep
from service.object_writes import PictureTarget
from service.problems import Conflict, IdMismatch, KeyReused, QueueFull
from service.seeds import Seed
from service.services import Services
from service.submission import DecodeParams, ParsedBitstream, Submission
from service.target_schemas import WRITTEN, Written
from service.waiter import Waiter
from worker.queue.jobs import MAX_SUBSCRIPTION_S, SUBSCRIPTION_S

router = APIRouter(prefix="/v1/decodes", tags=["decodes"], dependencies=[ONLY_KNOWN])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": schemas.Decode | Written,
        "content": schemas.PICTURES | {"application/json": {"example": WRITTEN}},
        "description": "The instant picture, or the finished picture if it is cached. For a "
        "diffusion tier, `Location` is the decode's URL and `Link` its picture's. With `Prefer: "
        "respond-async`, a client that accepts only JSON gets the status in place of a finished "
        "picture. With `target`, the response is JSON: what was written or, for a diffusion tier, "
        "the status.",
        "headers": {
            "Location": {"schema": {"type": "string"}, "example": "/v1/decodes/3f2b8c5d…"},
            "X-Afterimage-Tier": {"schema": {"type": "string"}, "example": "instant"},
            "X-Afterimage-Drawn": {
                "schema": {"type": "string"},
                "example": 'sampler="ddim", steps=4, seed="0"',
                "description": "How a finished picture was made: settings, seed, weights ids.",
            },
        },
    },
    202: {
        "model": schemas.Decode,
        "description": "With `target` or `Prefer: respond-async`: the decode is queued.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "example": 2}},
    },
    **problems.responses(
        *problems.OF_AUTHENTICATION,
        *problems.OF_BITSTREAMS,
        *problems.OF_COMPUTATION,
        *problems.OF_STORES,
        ParameterError,
        problems.NotAcceptable,
        problems.QueueAway,
        QueueFull,
        errors.Quarantined,
        KeyReused,
        Conflict,
    ),
}


async def decode_params(
    tier: Annotated[str, tier_query("Name of a tier; `/v1/tiers` lists them.")] = "instant",
    seed: Annotated[Seed, Query()] = 0,
    steps: Annotated[int | None, Query(ge=1, le=tiers.MAX_STEPS)] = None,
    eta: Annotated[float | None, Query(ge=0, le=1)] = None,
    gamma: Annotated[float | None, Query(ge=0, le=1)] = None,
    sampler: Annotated[tiers.Sampler | None, Query()] = None,
    guidance: Annotated[
        float | None,
        Query(
            ge=0,
            le=tiers.MAX_GUIDANCE,
            description="Autoguidance weight; 1 disables it, any other value doubles the cost.",
        ),
    ] = None,
    deadline_s: Annotated[
        int,
        Query(
            ge=1,
            le=MAX_SUBSCRIPTION_S,
            description="Seconds until the job is canceled, unless a client asks for its state.",
        ),
    ] = SUBSCRIPTION_S,
    webhook: Annotated[
        list[str] | None,
        Query(
            max_length=8,
            description="An https URL that gets a message (Standard Webhooks) when the job ends.",
        ),
    ] = None,
) -> DecodeParams:
    """Parse and check the query parameters. Raises `ParameterError`."""
    chosen = tiers.find(tier)
    if chosen.settings is None:
        only_diffusion = {
            "steps": steps, "eta": eta, "gamma": gamma, "sampler": sampler, "guidance": guidance,
            "webhook": webhook or None,
        }  # fmt: skip
        unused = ", ".join(name for name, value in only_diffusion.items() if value is not None)
        if unused:
            raise ParameterError(
                f"{unused}: only for diffusion tiers; an instant picture has no sampler, and is in "
                "the response. Choose another tier, or leave them out"
            )
        return DecodeParams(chosen, None, seed, deadline_s, ())
    settings = tiers.vary(
        chosen.settings, sampler=sampler, steps=steps, eta=eta, gamma=gamma, guidance=guidance
    )
    return DecodeParams(chosen, settings, seed, deadline_s, webhook or ())


async def parsed_bitstream(services: ServicesDep, data: DecodeInput) -> ParsedBitstream:
    """Parse the bitstream's header. Raises `BitstreamError`, `PictureTooLarge`."""
    began = time.perf_counter()
    b = await read_bitstream(services, data)
    digest = bitstream.digest(data)
    return ParsedBitstream(data, b, digest, (time.perf_counter() - began) * 1e3)


DecodeParamsDep = Annotated[DecodeParams, Depends(decode_params)]
ParsedBitstreamDep = Annotated[ParsedBitstream, Depends(parsed_bitstream)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Any key for this request. The same key for a different request is an error.",
    ),
]


@router.post(
    "",
    summary="Decode a bitstream",
    response_class=Response,
    openapi_extra=schemas.BITSTREAM,
    responses=_RESPONSES,
)
async def decode(
    services: ServicesDep,
    caller: DecodeCaller,
    request: Request,
    upload: ParsedBitstreamDep,
    params: DecodeParamsDep,
    target: PictureTargetDep,
    accept: AcceptHeader,
    prefer: PreferHeader,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Decode a bitstream: the body, or an object that `source` names.

    Responds with the instant picture. For a diffusion tier it also queues a job. The job's id is a
    digest of the request's content, so repeating the request does not queue a second job. Once the
    job has succeeded, the response is the finished picture.

    With `Prefer: wait=N` the response is the finished picture if it is ready within N seconds.

    With `target`, the picture is written to an object store, and the decode has succeeded once it
    is there. A target that holds the picture already is not written again.
    """
    if params.settings is None:
        b = upload.bitstream
        waiter = Waiter.of(request, caller)
        if target is not None:
            return await _write_instant(services, upload, target, waiter)
        format = negotiate.picture_format(accept, b.width, b.height)
        file = await services.instant.picture(b, upload.digest, format, waiter)
        timing = upload.server_timing(file)
        return image_response.picture(services, request, file.data, format, None, timing)
    job = submission.build_decode(services, upload, params, params.settings)
    request.state.job_id = job.id
    if idempotency_key is not None:
        await anyio.to_thread.run_sync(
            idempotency.check_key, services, caller.name, idempotency_key, job.id
        )
    return await Submission(
        services, request, upload, job, params, accept, prefer, caller, target
    ).respond()


async def _write_instant(
    services: Services, upload: ParsedBitstream, target: PictureTarget, waiter: Waiter
) -> Response:
    """Write the instant picture to its target, and respond with what was written."""
    b = upload.bitstream
    negotiate.check_size(target.format, b.width, b.height)
    file = await services.instant.picture(b, upload.digest, target.format, waiter)
    about = {"tier": "instant", "format": target.format, "bitstream": upload.digest,
             "codec": services.library.codec_id(b)}  # fmt: skip
    return await object_writes.written_response(
        services, target.reference, file.data, MEDIA_TYPES[target.format], about,
        upload.server_timing(file),
    )  # fmt: skip


@router.put(
    "/{id}",
    summary="Decode a bitstream under its id",
    response_class=Response,
    openapi_extra=schemas.BITSTREAM,
    responses={
        **_RESPONSES,
        201: {
            **_RESPONSES[200],
            "description": "As 200, for a decode that this request has created.",
        },
        422: problems.responses(
            *errors.BitstreamError.__subclasses__(), errors.Quarantined, ParameterError, IdMismatch
        )[422],
    },
)
async def put(
    services: ServicesDep,
    caller: DecodeCaller,
    request: Request,
    id: JobId,
    upload: ParsedBitstreamDep,
    params: DecodeParamsDep,
    target: PictureTargetDep,
    accept: AcceptHeader,
    prefer: PreferHeader,
) -> Response:
    """Decode a bitstream, as `POST`, under an id that the client computed from the content.

    The id is the first 32 hex digits of SHA-256 over six lines, joined by newlines: `afterimage-1`;
    SHA-256 of the bitstream in hex; the settings as JSON with sorted keys and no spaces (`beta`,
    `eta`, `gamma`, `guidance`, `sampler`, `steps`, with the values in `/v1/tiers`; all numbers
    except `steps` have a decimal point, as in `"eta":0.0`); the seed; the weights ids of the codec
    and of the decoder, which `/v1/models` lists.
    """
    if params.settings is None:
        raise ParameterError("an instant picture has no id; choose a diffusion tier or use POST")
    job = submission.build_decode(services, upload, params, params.settings)
    request.state.job_id = job.id
    if job.id != id:
        raise IdMismatch(f"the id of this content is {job.id}, not {id}")
    submitted = Submission(services, request, upload, job, params, accept, prefer, caller, target)
    response = await submitted.respond()
    if submitted.created and response.status_code == 200:
        response.status_code = 201
    return response
