"""JSON documents about targets in object stores."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

from worker.queue import targets

_ETAG = '"9bb58f26192e4ba00f01e2e7b136bbd8"'
TARGET: JsonDict = {
    "target": "store:outgoing/a.webp", "format": "webp", "status": "written", "etag": _ETAG,
    "error": None,
}  # fmt: skip
WRITTEN: JsonDict = {
    "target": "store:outgoing/a.webp", "media_type": "image/webp", "bytes": 98280, "etag": _ETAG
}  # fmt: skip


class Target(BaseModel):
    """A target of a decode."""

    model_config = ConfigDict(json_schema_extra={"examples": [TARGET]})

    target: str
    format: str
    status: Literal["pending", "written", "failed"]
    etag: str | None  # as the store reports it
    error: str | None

    @classmethod
    def of(cls, target: targets.Target) -> "Target":
        """Return the public view of a target."""
        return cls(
            target=target.reference, format=target.format, status=target.status,
            etag=target.etag or None, error=target.error or None,
        )  # fmt: skip


class Written(BaseModel):
    """What was written to a target: an instant picture, or the bitstream of a photograph."""

    model_config = ConfigDict(json_schema_extra={"examples": [WRITTEN]})

    target: str
    media_type: str
    bytes: int
    etag: str
