"""The JSON document that asks for a batch."""

from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from typing_extensions import TypedDict

from models import tiers
from models.image import OutputFormat
from service.seeds import Seed
from worker.queue.batches.records import MAX_ITEMS
from worker.queue.records import Priority

REQUEST: JsonDict = {
    "source": "store:incoming/holiday/", "target": "store:outgoing/holiday/", "format": "webp",
    "tier": "perceptual", "on_existing": "skip",
}  # fmt: skip
REQUEST_OF_ITEMS: JsonDict = {
    "items": [
        {"source": "store:incoming/a.msh", "target": "store:outgoing/a.webp"},
        {"source": "store:incoming/b.msh", "target": "store:outgoing/b.webp", "seed": 7},
    ],
    "tier": "perceptual",
}


class BatchItem(TypedDict):
    """A bitstream to decode, and where to write its picture."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    source: Annotated[str, Field(description="An object `store:NAME/KEY`.")]
    target: Annotated[str, Field(description="An object `store:NAME/KEY`.")]
    seed: NotRequired[Annotated[Seed | None, Field(description="Default: the batch's.")]]


class BatchRequest(BaseModel):
    """A batch: `items`, or the prefixes `source` and `target`, and what all items share."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [REQUEST, REQUEST_OF_ITEMS]}
    )

    items: list[BatchItem] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="The items, instead of prefixes.",
    )
    source: str | None = Field(
        None,
        description="A prefix `store:NAME/PREFIX/`: all objects below it whose key ends with "
        "`suffix` are decoded.",
    )
    target: str | None = Field(
        None,
        description="A prefix: pictures get the names of the sources, with the format's suffix.",
    )
    suffix: str = Field(".msh", min_length=2, max_length=32, pattern="^[A-Za-z0-9._-]+$")
    tier: str = Field("perceptual", json_schema_extra={"enum": [*tiers.TIERS]})
    seed: Seed = 0
    steps: int | None = Field(None, ge=1, le=tiers.MAX_STEPS)
    eta: float | None = Field(None, ge=0, le=1)
    gamma: float | None = Field(None, ge=0, le=1)
    sampler: tiers.Sampler | None = None
    guidance: float | None = Field(None, ge=0, le=tiers.MAX_GUIDANCE)
    format: OutputFormat | None = Field(
        None, description="Default: the one that each target's suffix names; for prefixes, png."
    )
    realism: float = Field(
        1.0, ge=0, le=1, description="0: the codec's picture, 1: the tier's; between, a mix."
    )
    priority: Priority = "batch"
    webhook: list[str] = Field(
        [], max_length=8, description="https URLs that get `batch.ended` when the batch ends."
    )
    on_existing: Literal["skip", "replace"] = Field(
        "skip", description="What to do about a target that exists already."
    )
