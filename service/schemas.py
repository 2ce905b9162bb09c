"""JSON documents of the API."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from models import tiers
from models.bitstream import Bitstream, Format, Metric, Profile
from service import problems
from worker.jobs import JobState, Status


class Problem(BaseModel):
    """RFC 9457 problem document."""

    model_config = ConfigDict(json_schema_extra={"examples": [problems.EXAMPLE]})

    type: str
    title: str
    status: int
    detail: str


class Decode(BaseModel):
    """Where a diffusion decode stands."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e",
                    "status": "running",
                    "tier": "perceptual",
                    "seed": 0,
                    "step": 2,
                    "total": 4,
                    "position": None,
                    "attempts": 1,
                    "width": 768,
                    "height": 512,
                    "quality": 2,
                    "codec_weights": "4db2e4cc55a0a9ca",
                    "decoder_weights": "0f1e2d3c4b5a6978",
                    "created": "2026-01-01T12:00:00Z",
                    "started": "2026-01-01T12:00:01Z",
                    "ended": None,
                    "error": None,
                    "image": "/v1/decodes/3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e/image",
                }
            ]
        }
    )

    id: str
    status: Status
    tier: str
    seed: int
    step: int
    total: int
    position: int | None
    attempts: int
    width: int
    height: int
    quality: int
    codec_weights: str
    decoder_weights: str
    created: datetime
    started: datetime | None
    ended: datetime | None
    error: str | None
    image: str

    @classmethod
    def of(cls, state: JobState, position: int | None) -> "Decode":
        """The public view of a job."""
        d = state.decode
        return cls(
            id=state.id, status=state.status, tier=d.tier, seed=d.seed, step=state.step,
            total=state.total, position=position, attempts=state.attempts, width=d.width,
            height=d.height, quality=d.quality, codec_weights=d.codec,
            decoder_weights=d.decoder, created=datetime.fromtimestamp(state.created, UTC),
            started=_time(state.started), ended=_time(state.ended), error=state.error or None,
            image=f"/v1/decodes/{state.id}/image",
        )  # fmt: skip


class Inspection(BaseModel):
    """What a bitstream's header says."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "format": "msh",
                    "profile": "exact",
                    "quality": 2,
                    "metric": "mse",
                    "width": 768,
                    "height": 512,
                    "bytes": 9828,
                    "bpp": 0.2,
                    "weights_id": "4db2e4cc55a0a9ca",
                    "decodable": True,
                    "steps": {"instant": 0, "perceptual": 4},
                }
            ]
        }
    )

    format: Format
    profile: Profile
    quality: int
    metric: Metric
    width: int
    height: int
    bytes: int
    bpp: float
    weights_id: str | None
    decodable: bool
    steps: dict[str, int]

    @classmethod
    def of(cls, b: Bitstream, size: int, decodable: bool) -> "Inspection":
        """The public view of a header; `decodable` where its weights are installed."""
        return cls(
            format=b.format, profile=b.profile, quality=b.quality, metric=b.metric,
            width=b.width, height=b.height, bytes=size,
            bpp=round(8 * size / (b.width * b.height), 4), weights_id=b.weights_id or None,
            decodable=decodable,
            steps={t.name: t.settings.steps if t.settings else 0 for t in tiers.TIERS.values()},
        )  # fmt: skip


class Tier(BaseModel):
    """A published point on the distortion-perception curve."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "ddim-10", "description": "…", "sampler": "ddim", "steps": 10, "eta": 0.0}
            ]
        }
    )

    name: str
    description: str
    sampler: str | None
    steps: int
    eta: float

    @classmethod
    def of(cls, tier: tiers.Tier) -> "Tier":
        """The public view of a tier."""
        s = tier.settings
        return cls(
            name=tier.name,
            description=tier.description,
            sampler=s.sampler if s else None,
            steps=s.steps if s else 0,
            eta=s.eta if s else 0.0,
        )


class Health(BaseModel):
    """Whether the service can take work."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok", "redis": "up"}]})

    status: str
    redis: str


def _time(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
