"""`POST /v1/encodes` and `POST /v1/inspect`: encode a photograph, read a bitstream's header."""

import contextlib
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from models.codec import bitstream
from models.codec.architectures import DEFAULT, ModelName
from models.codec.bitstream import Format, Metric
from models.errors import (
    ParameterError,
    PictureError,
    PictureTooLarge,
    UnsupportedPicture,
    WrongWeights,
)
from models.pictures import decode
from service import object_writes, problems, schemas
from service.deps import ONLY_KNOWN, DecodeCaller, EncodeCaller, RequestBody, ServicesDep
from service.drafts import read_bitstream
from service.object_params import BitstreamTargetDep, EncodeInput
from service.target_schemas import WRITTEN, Written
from service.waiter import Waiter
from worker.queue import estimates
from worker.queue.store import RedisError

router = APIRouter(prefix="/v1", dependencies=[ONLY_KNOWN])

_MEDIA_TYPE = "application/octet-stream"
_HEADERS = {
    "X-Afterimage-Bpp": {"schema": {"type": "number"}, "example": 0.21},
    "X-Afterimage-Warning": {
        "description": "What is wrong with the photograph; absent if nothing is.",
        "schema": {"type": "string"},
        "example": decode.MISSING,
    },
}


def _upload(description: str, *media_types: str, required: bool = True) -> dict[str, Any]:
    content = dict.fromkeys(media_types, schemas.RAW) | schemas.FORM
    return {"requestBody": {"required": required, "description": description, "content": content}}


@router.post(
    "/encodes",
    summary="Encode a photograph",
    tags=["encodes"],
    response_class=Response,
    openapi_extra=_upload(
        "A photograph. Leave it out with `source`.",
        "image/png",
        "image/jpeg",
        "image/webp",
        "image/avif",
        required=False,
    ),  # fmt: skip
    responses={
        200: {
            "content": {
                _MEDIA_TYPE: {"schema": schemas.BINARY},
                "application/json": {"example": WRITTEN},
            },
            "model": Written,
            "description": "The bitstream; with `target`, a document about what was written.",
            "headers": _HEADERS,
        },
        **problems.responses(
            *problems.OF_AUTHENTICATION,
            *problems.OF_BODIES,
            *problems.OF_COMPUTATION,
            *problems.OF_STORES,
            PictureError,
            UnsupportedPicture,
            PictureTooLarge,
            ParameterError,
            WrongWeights,
        ),
    },
)
async def encode(
    services: ServicesDep,
    caller: EncodeCaller,
    request: Request,
    data: EncodeInput,
    target: BitstreamTargetDep,
    quality: Annotated[
        int,
        Query(
            ge=1,
            le=8,
            description="1: smallest file, 3: best picture; 4 to 8 need imported weights.",
        ),
    ] = 2,
    metric: Annotated[
        Metric,
        Query(
            description="Metric for which the codec was trained; ms-ssim needs imported weights."
        ),
    ] = "mse",
    format: Annotated[Format, Query(description="Container format of the bitstream.")] = "msh",
    model: Annotated[
        ModelName,
        Query(
            description="Codec. Others than mbt2018-mean need imported weights, and the format "
            "compressai."
        ),
    ] = DEFAULT,
) -> Response:
    """Encode a photograph. It is rotated by its EXIF orientation, converted to sRGB, and
    transparent pixels are blended with white. A truncated photograph is encoded as far as it
    goes, and the response has the header X-Afterimage-Warning."""

    waiter = Waiter.of(request, caller)
    encoded = await services.encoder.encode(data, quality, metric, format, waiter, model)
    b = encoded.bitstream
    file = bitstream.serialize(b)
    headers = {"X-Afterimage-Bpp": f"{8 * len(file) / (b.width * b.height):.4f}"}
    if encoded.notes:
        headers["X-Afterimage-Warning"] = "; ".join(encoded.notes)
    if target is not None:
        about = {"quality": str(quality), "metric": metric, "format": format}
        return await object_writes.written_response(
            services, target, file, _MEDIA_TYPE, about, headers
        )
    return Response(file, 200, headers, _MEDIA_TYPE)


@router.post(
    "/inspect",
    summary="Read a bitstream's header",
    tags=["inspect"],
    openapi_extra=_upload("A bitstream.", _MEDIA_TYPE),
    responses=problems.responses(
        *problems.OF_AUTHENTICATION, *problems.OF_BITSTREAMS, ParameterError
    ),
)
async def inspect(
    services: ServicesDep, caller: DecodeCaller, data: RequestBody
) -> schemas.Inspection:
    """Read a bitstream's header and predict the cost of each tier, without decoding."""
    b = await read_bitstream(services, data)
    decodable, cost = True, None
    try:
        services.library.codec_id(b)
    except WrongWeights:
        decodable = False
    with contextlib.suppress(RedisError):  # without Redis, costs of diffusion tiers are unknown
        cost = await anyio.to_thread.run_sync(estimates.cost_model, services.jobs)
    return schemas.Inspection.of(
        b, len(data), decodable, services.instant.megapixel_s.get(b.model), cost
    )
