"""`/v1/models`, `/v1/tiers` and `/v1/limits`: what this service offers and allows."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Response

from models.codec import catalogue
from models.errors import ParameterError
from models.tiers import TIERS
from service import problems, schemas
from service.deps import ONLY_KNOWN, ServicesDep
from service.problems import ModelNotFound

router = APIRouter(prefix="/v1", tags=["about"], dependencies=[ONLY_KNOWN])

_MARKDOWN = "text/markdown"


@router.get("/models", summary="List the installed weights")
async def models(services: ServicesDep) -> list[schemas.Model]:
    """List the codecs, shipped and imported, and the diffusion decoder. Weights ids are part of the
    id of a decode; an `.msh` file contains the id of the weights that encoded it."""
    return [
        schemas.Model.of(row.entry)
        for row in (*catalogue.shipped(), *services.library.imports.rows)
    ]


@router.get(
    "/models/{weights_id}/card",
    summary="Get a model card",
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
        Path(
            pattern="^[0-9a-f]{16}$",
            examples=["d78422ef2d93dd50"],
            description="Weights id of a model.",
        ),
    ],
) -> Response:
    """The model card: training data, training, results and licence."""
    for row in catalogue.shipped():
        if row.entry.weights_id == weights_id and row.entry.card:
            text = await anyio.to_thread.run_sync((row.folder / row.entry.card).read_text, "utf-8")
            return Response(text, media_type=_MARKDOWN)
    raise ModelNotFound(
        f"there is no model card for weights {weights_id}; /v1/models lists the cards that exist"
    )


@router.get("/tiers", summary="List the tiers")
async def tiers() -> list[schemas.Tier]:
    """List the tiers, from low distortion to natural looks, with their sampler settings."""
    return [schemas.Tier.of(t) for t in TIERS.values()]


@router.get("/limits", summary="Get the limits of requests")
async def limits(services: ServicesDep) -> schemas.Limits:
    """The limits beyond which requests are refused."""
    return schemas.Limits.of(services.settings)
