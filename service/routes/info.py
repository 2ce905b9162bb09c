"""`/v1/models`, `/v1/tiers`, `/v1/limits`: what this service can do."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Response

from models.codec import catalogue
from models.errors import ParameterError
from models.tiers import TIERS
from service import problems, schemas
from service.deps import Own
from service.problems import ModelNotFound

router = APIRouter(prefix="/v1", tags=["about"])

_MARKDOWN = "text/markdown"


@router.get("/models", summary="Installed weights")
async def models(own: Own) -> list[schemas.Model]:
    """Codecs, shipped and imported, and the diffusion decoder: their ids are part of every decode's
    id, and a bitstream names those that it was made with."""
    return [
        schemas.Model.of(row.entry) for row in (*catalogue.shipped(), *own.library.imports.rows)
    ]


@router.get(
    "/models/{weights_id}/card",
    summary="A model card",
    response_class=Response,
    responses={
        200: {
            "content": {_MARKDOWN: {"schema": {"type": "string"}, "example": "# Codec: …"}},
            "description": "Markdown: data, training, results, licence.",
        },
        **problems.responses(ModelNotFound, ParameterError),
    },
)
async def card(
    weights_id: Annotated[
        str,
        Path(pattern="^[0-9a-f]{16}$", examples=["d78422ef2d93dd50"], description="Of a model."),
    ],
) -> Response:
    """What the weights were made of and how well they do."""
    for row in catalogue.shipped():
        if row.entry.weights_id == weights_id and row.entry.card:
            text = await anyio.to_thread.run_sync((row.folder / row.entry.card).read_text, "utf-8")
            return Response(text, media_type=_MARKDOWN)
    raise ModelNotFound(f"there is no card of weights {weights_id}")


@router.get("/tiers", summary="All tiers")
async def tiers() -> list[schemas.Tier]:
    """Points on the curve between low distortion and natural looks."""
    return [schemas.Tier.of(t) for t in TIERS.values()]


@router.get("/limits", summary="Caps on requests")
async def limits(own: Own) -> schemas.Limits:
    """What is refused."""
    return schemas.Limits.of(own.settings)
