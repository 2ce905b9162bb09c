"""What a job is: the request, its id, and where it stands."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from models import geometry
from models.tiers import Settings

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "canceled", "expired"})


@dataclass(frozen=True, slots=True)
class Decode:
    """What is asked for. Two equal requests are one job: its id is the digest of its content."""

    digest: str  # SHA-256 of the bitstream, hex
    tier: str
    settings: Settings
    seed: int
    codec: str  # weights ids
    decoder: str
    quality: int
    width: int
    height: int

    @property
    def id(self) -> str:
        """32 hex digits of SHA-256 over the lines: recipe's name, digest, settings, seed, weights.

        The tier's name is no part of it: equal settings are equal pictures.
        """
        settings = json.dumps(asdict(self.settings), sort_keys=True, separators=(",", ":"))
        lines = ("afterimage-1", self.digest, settings, str(self.seed), self.codec, self.decoder)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @property
    def shape(self) -> tuple[int, int, Settings]:
        """Decodes that agree in it can be drawn together: padded sides and settings."""
        return *geometry.padded(self.height, self.width), self.settings

    @property
    def work(self) -> float:
        """What the picture costs, in megapixel-steps of its coded size."""
        return geometry.megapixels(self.height, self.width) * self.settings.calls


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's record. Times are seconds since the epoch, 0 while they have not come."""

    id: str
    status: Status
    decode: Decode
    step: int
    total: int
    attempts: int
    created: float
    started: float
    ended: float
    error: str
    eta_s: float = 0.0  # what was predicted at submission; 0: nothing
    fence: int = 0  # of the attempt that may write: higher with each
    owner: str = ""  # of that attempt: one for all that a worker draws together
    request_id: str = ""  # of the request that queued it, and its trace
    traceparent: str = ""

    @classmethod
    def of(cls, job_id: str, row: Mapping[bytes, bytes]) -> "JobState | None":
        """The record of a job from its hash; None where there is none."""
        if b"decode" not in row:  # nothing, or what a worker wrote after the record was lost
            return None
        fields = {k.decode(): v.decode() for k, v in row.items()}
        request = json.loads(fields["decode"])
        return cls(
            id=job_id,
            status=fields["status"],  # type: ignore[arg-type]
            decode=Decode(**{**request, "settings": Settings(**request["settings"])}),
            step=int(fields["step"]),
            total=int(fields["total"]),
            attempts=int(fields["attempts"]),
            fence=int(fields.get("fence", 0)),
            owner=fields.get("owner", ""),
            created=float(fields["created"]),
            started=float(fields["started"]),
            ended=float(fields["ended"]),
            error=fields["error"],
            eta_s=float(fields.get("eta_s", 0)),
            request_id=fields.get("request_id", ""),
            traceparent=fields.get("traceparent", ""),
        )


def fresh(decode: Decode) -> dict[Any, Any]:
    """The hash of a job that was just queued."""
    return {
        "status": "queued",
        "decode": json.dumps(asdict(decode)),
        "step": 0,
        "total": decode.settings.steps,
        "attempts": 0,
        "fence": int(time.time() * 1e3),  # above that of any attempt at a record before this one
        "created": time.time(),
        "started": 0,
        "ended": 0,
        "error": "",
        "work": decode.work,
    }


def end(status: Status, error: str) -> dict[Any, Any]:
    """The fields that change when a job ends."""
    return {"status": status, "ended": time.time(), "error": error}
