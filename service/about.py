"""`/v1/models`, `/v1/tiers`, `/v1/limits`: what this service can do."""

from fastapi import APIRouter

from models import catalogue
from models.tiers import TIERS
from service import schemas
from service.deps import Own

router = APIRouter(prefix="/v1", tags=["about"])


@router.get("/models", summary="Installed weights")
async def models(own: Own) -> list[schemas.Model]:
    """Codecs, shipped and imported, and the diffusion decoder: their ids are part of every decode's
    id, and a bitstream names those that it was made with."""
    return [
        schemas.Model.of(row.entry) for row in (*catalogue.shipped(), *own.library.imports.rows)
    ]


@router.get("/tiers", summary="All tiers")
async def tiers() -> list[schemas.Tier]:
    """Points on the curve between low distortion and natural looks."""
    return [schemas.Tier.of(t) for t in TIERS.values()]


@router.get("/limits", summary="Caps on requests")
async def limits(own: Own) -> schemas.Limits:
    """What is refused."""
    return schemas.Limits.of(own.settings)
