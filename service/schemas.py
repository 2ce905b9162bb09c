"""JSON documents of the API; their names are part of the OpenAPI document."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models import geometry, tiers
from models.checkpoint import Entry
from models.codec import catalogue
from models.codec.bitstream import Bitstream, Format, Metric, Profile
from models.image import MEDIA_TYPES
from service import prefix, problems
from service.negotiate import MAX_WAIT_S
from service.seeds import SeedText
from service.settings import ServiceSettings
from service.target_schemas import Target
from worker.queue.estimates import CostModel
from worker.queue.jobs import MAX_SUBSCRIPTION_S
from worker.queue.records import JobState, Status
from worker.queue.targets import Target as StoredTarget


class Fault(BaseModel):
    """An invalid parameter."""

    parameter: str
    in_: str = Field(alias="in")
    message: str


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    model_config = ConfigDict(json_schema_extra={"examples": [problems.EXAMPLE]})

    type: str
    title: str
    status: int
    detail: str
    errors: list[Fault] | None = Field(
        None, description="With `parameter-error`: the invalid parameters."
    )


class Decode(BaseModel):
    """The state of a diffusion decode."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e",
                    "status": "running",
                    "tier": "ddim-10",
                    "seed": 0,
                    "seed_text": "0",
                    "step": 2,
                    "total": 10,
                    "position": None,
                    "eta_s": 1.4,
                    "attempts": 1,
                    "width": 768,
                    "height": 512,
                    "quality": 2,
                    "codec_weights": "d78422ef2d93dd50",
                    "decoder_weights": "0f1e2d3c4b5a6978",
                    "created": "2026-01-01T12:00:00Z",
                    "started": "2026-01-01T12:00:01Z",
                    "ended": None,
                    "error": None,
                    "image": "/v1/decodes/3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e/image",
                    "targets": [],
                }
            ]
        }
    )

    id: str
    status: Status
    tier: str
    seed: int
    seed_text: SeedText
    step: int
    total: int
    position: int | None  # jobs ahead in the queue
    eta_s: float | None  # predicted seconds until the job ends
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
    targets: list[Target]  # of the caller

    @classmethod
    def of(
        cls,
        state: JobState,
        position: int | None,
        eta_s: float | None,
        owned: Sequence[StoredTarget] = (),
    ) -> "Decode":
        """Return the public view of a job."""
        d = state.decode
        return cls(
            id=state.id, status=state.status, tier=d.tier, seed=d.seed,
            seed_text=str(d.seed), step=state.step, total=state.total, position=position,
            eta_s=None if eta_s is None else round(eta_s, 1),
            attempts=state.attempts, width=d.width,
            height=d.height, quality=d.quality, codec_weights=d.codec,
            decoder_weights=d.decoder, created=datetime.fromtimestamp(state.created, UTC),
            started=_time(state.started), ended=_time(state.ended), error=state.error or None,
            image=prefix.public(f"/v1/decodes/{state.id}/image"),
            targets=[Target.of(target) for target in owned],
        )  # fmt: skip


class Cost(BaseModel):
    """The cost of a tier's picture."""

    steps: int
    megapixel_steps: float  # steps times megapixels; guidance other than 1 doubles it
    seconds: float | None  # predicted on one worker; null before any measurement


class Inspection(BaseModel):
    """The header of a bitstream, and the cost of its picture in each tier."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "format": "msh",
                    "layout": ".msh version 1",
                    "model": "mbt2018-mean",
                    "profile": "exact",
                    "quality": 2,
                    "metric": "mse",
                    "width": 768,
                    "height": 512,
                    "bytes": 9828,
                    "bpp": 0.2,
                    "weights_id": "d78422ef2d93dd50",
                    "decodable": True,
                    "costs": {
                        "instant": {"steps": 0, "megapixel_steps": 0, "seconds": 0.1},
                        "perceptual": {"steps": 1, "megapixel_steps": 0.393, "seconds": 0.5},
                    },
                }
            ]
        }
    )

    format: Format
    layout: str
    model: str  # architecture of the codec, as CompressAI names it
    profile: Profile
    quality: int
    metric: Metric
    width: int
    height: int
    bytes: int
    bpp: float
    weights_id: str | None
    decodable: bool
    costs: dict[str, Cost]

    @classmethod
    def of(
        cls,
        b: Bitstream,
        size: int,
        decodable: bool,
        instant_s: float | None = None,
        model: CostModel | None = None,
    ) -> "Inspection":
        """Return the public view of a header.

        `size`: bytes of the bitstream; `decodable`: whether its weights are installed;
        `instant_s`: measured seconds per megapixel (of the padded picture) of an instant decode;
        `model`: cost model of diffusion decodes.
        """
        coded = geometry.megapixels(b.height, b.width)

        def cost(tier: tiers.Tier) -> Cost:
            calls = tier.settings.calls if tier.settings else 0
            seconds = model.seconds(coded * calls) if model and tier.settings else None
            if tier.settings is None and instant_s is not None:
                seconds = coded * instant_s
            return Cost(
                steps=tier.settings.steps if tier.settings else 0,
                megapixel_steps=round(b.width * b.height / 1e6 * calls, 4),
                seconds=None if seconds is None else round(seconds, 3),
            )

        return cls(
            format=b.format, layout=b.layout, model=b.model, profile=b.profile, quality=b.quality,
            metric=b.metric,
            width=b.width, height=b.height, bytes=size,
            bpp=round(8 * size / (b.width * b.height), 4), weights_id=b.weights_id or None,
            decodable=decodable, costs={t.name: cost(t) for t in tiers.TIERS.values()},
        )  # fmt: skip


class Tier(BaseModel):
    """Named sampler settings: a choice between low distortion and natural looks."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "ddim-10",
                    "description": "…",
                    "sampler": "ddim",
                    "steps": 10,
                    "eta": 0.0,
                    "gamma": 1.0,
                    "beta": 0.0,
                    "guidance": 1.0,
                }
            ]
        }
    )

    name: str
    description: str
    sampler: str | None
    steps: int
    eta: float
    gamma: float
    beta: float
    guidance: float

    @classmethod
    def of(cls, tier: tiers.Tier) -> "Tier":
        """Return the public view of a tier."""
        s = tier.settings
        return cls(
            name=tier.name,
            description=tier.description,
            sampler=s.sampler if s else None,
            steps=s.steps if s else 0,
            eta=s.eta if s else 0.0,
            gamma=s.gamma if s else 1.0,
            beta=s.beta if s else 0.0,
            guidance=s.guidance if s else 1.0,
        )


class Model(BaseModel):
    """Installed weights."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "kind": "codec",
                    "name": "msh_q2",
                    "model": "mbt2018-mean",
                    "weights_id": "d78422ef2d93dd50",
                    "quality": 2,
                    "metric": "mse",
                    "steps": None,
                    "source": "shipped",
                    "sha256": "af06aecc…",
                    "card": "/v1/models/d78422ef2d93dd50/card",
                }
            ]
        }
    )

    kind: str  # codec or decoder
    name: str
    model: str | None  # architecture of a codec, as CompressAI names it
    weights_id: str
    quality: int | None
    metric: str | None
    steps: int | None  # that a diffusion decoder draws at beta 1; null: all other settings
    source: str
    sha256: str  # of the file
    card: str | None  # URL of its model card

    @classmethod
    def of(cls, e: Entry) -> "Model":
        """Return the public view of an entry of a weights manifest."""
        return cls(
            kind=e.kind, name=e.name, model=catalogue.model_of(e) or None,
            weights_id=e.weights_id, quality=e.quality or None, metric=e.metric or None,
            steps=e.steps or None, source=e.source or "shipped", sha256=e.sha256,
            card=prefix.public(f"/v1/models/{e.weights_id}/card") if e.card else None,
        )  # fmt: skip


class Link(BaseModel):
    """A signed URL."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "url": "/v1/decodes/3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e/image?min_tier=instant"
                    "&realism=1.0&expires=1767268800&signature=Zk3…",
                    "expires": "2026-01-01T12:00:00Z",
                }
            ]
        }
    )

    url: str
    expires: datetime

    @classmethod
    def until(cls, url: str, seconds: int) -> "Link":
        """Return a link that expires at `seconds` since the epoch."""
        return cls(url=url, expires=datetime.fromtimestamp(seconds, UTC))


class Limits(BaseModel):
    """Limits of requests."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bytes": 33554432,
                    "pixels": 20000000,
                    "megapixel_steps": 2000,
                    "steps": 1000,
                    "wait_s": 60,
                    "deadline_s": 86400,
                    "request_timeout_s": 30,
                }
            ]
        }
    )

    bytes: int  # largest request body
    pixels: int  # largest picture, of a bitstream or an upload
    megapixel_steps: float  # megapixels times steps of a job; guidance other than 1 doubles it
    steps: int  # largest number of sampler steps
    wait_s: int  # largest `Prefer: wait`
    deadline_s: int  # largest `deadline_s` of a decode
    request_timeout_s: float  # longest wait for an instant picture

    @classmethod
    def of(cls, s: ServiceSettings) -> "Limits":
        """Return the limits that these settings set."""
        return cls(
            bytes=s.max_bytes, pixels=s.max_pixels, megapixel_steps=s.max_megapixel_steps,
            steps=tiers.MAX_STEPS, wait_s=MAX_WAIT_S, deadline_s=MAX_SUBSCRIPTION_S,
            request_timeout_s=s.request_timeout_s,
        )  # fmt: skip


class Health(BaseModel):
    """The health of the service."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok", "redis": "up"}]})

    status: str
    redis: str


def _time(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
RAW: dict[str, Any] = {}
"""A raw body has no schema in OpenAPI 3.1, so that generated clients accept bytes and not text."""
PICTURES: dict[str, Any] = {media_type: {"schema": BINARY} for media_type in MEDIA_TYPES.values()}
FORM: dict[str, Any] = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "description": "One file and no fields; parameters belong in the query.",
            "properties": {"file": BINARY},
            "required": ["file"],
        }
    }
}
BITSTREAM: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "description": "A bitstream: `.msh`, or an image file of CompressAI's `codec.py`. Leave it "
        "out with `source`.",
        "content": {
            "application/octet-stream": RAW,
            **FORM,
        },
    }
}
