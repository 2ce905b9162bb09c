"""Types of seeds: in requests numbers or strings of digits, in responses both."""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from models.tiers import MAX_SEED

_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        {"type": "string", "format": "uint64"},
    ],
    "title": "Seed",
    "description": "A string is exact in languages that round numbers of 2^53 and more.",
}

Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WithJsonSchema(_SCHEMA)]
"""A seed in a request: 0 to 2^64 - 1."""
SeedText = Annotated[
    str, Field(description="The seed as text: JavaScript rounds numbers of 2^53 and more.")
]
