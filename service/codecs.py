"""`/v1/encodes`, `/v1/inspect`: what is done with bitstreams and needs no queue."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from models import bitstream, codec, image
from models.bitstream import Bitstream, Format, Metric
from models.errors import WrongWeights
from service import problems, schemas
from service.deps import Body, Decoding, Encoding, Own

router = APIRouter(prefix="/v1")

_MEDIA_TYPE = "application/octet-stream"


def _upload(description: str, *media_types: str) -> dict[str, Any]:
    content: dict[str, Any] = {m: {"schema": schemas.BINARY} for m in media_types}
    content["multipart/form-data"] = {
        "schema": {"type": "object", "properties": {"file": schemas.BINARY}}
    }
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
        **problems.responses(413, 415, 422, 503, 504),
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
    responses=problems.responses(400, 413, 415, 422),
)
async def inspect(own: Own, caller: Decoding, data: Body) -> schemas.Inspection:
    """What a bitstream's header says; nothing is decoded."""
    b = bitstream.parse(data, own.settings.max_pixels)
    try:
        own.library.codec_id(b)
    except WrongWeights:
        return schemas.Inspection.of(b, len(data), decodable=False)
    return schemas.Inspection.of(b, len(data), decodable=True)
