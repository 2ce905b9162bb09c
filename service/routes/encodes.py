"""`/v1/encodes`, `/v1/inspect`: what is done with bitstreams and needs no queue."""

import contextlib
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Response

from models import image
from models.codec import bitstream, codec
from models.codec.bitstream import Bitstream, Format, Metric
from models.errors import (
    ParameterError,
    PictureError,
    PictureTooLarge,
    UnsupportedPicture,
    WrongWeights,
)
from service import problems, schemas
from service.deps import Body, Decoding, Encoding, Own
from worker.queue import estimates
from worker.queue.store import RedisError

router = APIRouter(prefix="/v1")

_MEDIA_TYPE = "application/octet-stream"


def _upload(description: str, *media_types: str) -> dict[str, Any]:
    content = {m: {"schema": schemas.BINARY} for m in media_types} | schemas.FORM
    return {"requestBody": {"required": True, "description": description, "content": content}}


@router.post(
    "/encodes",
    summary="Encode a photograph",
    tags=["encodes"],
    response_class=Response,
    openapi_extra=_upload("A photograph.", "image/png", "image/jpeg", "image/webp", "image/avif"),
    responses={
        200: {
            "content": {_MEDIA_TYPE: {"schema": schemas.BINARY}},
            "description": "The bitstream.",
            "headers": {"X-Afterimage-Bpp": {"schema": {"type": "number"}, "example": 0.21}},
        },
        **problems.responses(
            *problems.OF_KEYS,
            *problems.OF_BODIES,
            *problems.OF_LINES,
            PictureError,
            UnsupportedPicture,
            PictureTooLarge,
            ParameterError,
            WrongWeights,
        ),
    },
)
async def encode(
    own: Own,
    caller: Encoding,
    data: Body,
    quality: Annotated[
        int, Query(ge=1, le=8, description="1: smallest, 3: best; to 8 with imported weights.")
    ] = 2,
    metric: Annotated[
        Metric, Query(description="What the codec was trained for; ms-ssim with imported weights.")
    ] = "mse",
    format: Annotated[Format, Query(description="Container of the result.")] = "msh",
) -> Response:
    """Encode a photograph: upright by EXIF, in sRGB, transparency flattened on white."""

    def compute() -> Bitstream:
        used = own.library.find(quality, metric)
        pixels = image.read(data, own.settings.max_pixels)
        return used.encode(codec.to_tensor(pixels), format, "exact")

    b = await own.instant.run(compute)
    made = bitstream.serialize(b)
    headers = {"X-Afterimage-Bpp": f"{8 * len(made) / (b.width * b.height):.4f}"}
    return Response(made, 200, headers, _MEDIA_TYPE)


@router.post(
    "/inspect",
    summary="Read a bitstream's header",
    tags=["inspect"],
    openapi_extra=_upload("A bitstream.", _MEDIA_TYPE),
    responses=problems.responses(*problems.OF_KEYS, *problems.OF_BITSTREAMS),
)
async def inspect(own: Own, caller: Decoding, data: Body) -> schemas.Inspection:
    """What a bitstream's header says, and what its pictures cost; nothing is decoded."""
    b = bitstream.parse(data, own.settings.max_pixels)
    decodable, cost = True, None
    try:
        own.library.codec_id(b)
    except WrongWeights:
        decodable = False
    with contextlib.suppress(RedisError):  # without the queue, nothing is known of workers
        cost = await anyio.to_thread.run_sync(estimates.cost_model, own.jobs)
    return schemas.Inspection.of(b, len(data), decodable, own.instant.megapixel_s, cost)
