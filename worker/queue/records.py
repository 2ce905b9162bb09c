"""Job records: the decode request, the job id that follows from it, and the job's state."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from models import geometry
from models.tiers import Settings

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
Priority = Literal["interactive", "batch"]
"""Workers take interactive jobs first."""
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "canceled", "expired"})


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """Everything that determines a diffusion picture. Equal requests share one job."""

    digest: str  # SHA-256 of the bitstream, hex
    tier: str
    settings: Settings
    seed: int
    codec: str  # weights id of the codec
    decoder: str  # weights id of the diffusion decoder
    quality: int
    width: int
    height: int

    @property
    def id(self) -> str:
        """The job id: 32 hex digits of SHA-256 over version, digest, settings, seed and weights.

        The tier's name is left out: equal settings give equal pictures.
        """
        settings = json.dumps(asdict(self.settings), sort_keys=True, separators=(",", ":"))
        lines = ("afterimage-1", self.digest, settings, str(self.seed), self.codec, self.decoder)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @property
    def shape(self) -> tuple[int, int, Settings]:
        """Padded height and width, and settings. Jobs with equal shapes can run as one batch."""
        return *geometry.padded(self.height, self.width), self.settings

    @property
    def work(self) -> float:
        """Cost of the picture in megapixel-steps of its coded size."""
        return geometry.megapixels(self.height, self.width) * self.settings.calls


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's record. Times are seconds since the epoch, or 0 if that has not happened yet."""

    id: str
    status: Status
    decode: DecodeRequest
    step: int
    total: int
    attempts: int
    created: float
    started: float
    ended: float
    error: str
    eta_s: float = 0.0  # predicted at submission; 0 if nothing was predicted
    fence: int = 0  # number of the attempt that may write; each attempt has a higher one
    owner: str = ""  # id of the batch to which that attempt belongs
    request_id: str = ""  # id of the HTTP request that queued the job
    traceparent: str = ""  # trace context of that request
    caller: str = ""  # the caller in whose queue the job waits
    priority: Priority = "interactive"
    weight: float = 1.0  # share of the drawings that this caller gets
    worker: str = ""  # name of the worker of the latest attempt

    @classmethod
    def of(cls, job_id: str, row: Mapping[bytes, bytes]) -> "JobState | None":
        """Parse a job's hash; None if there is no record."""
        if b"decode" not in row:  # empty, or fields that a worker wrote after the record expired
            return None
        fields = {k.decode(): v.decode() for k, v in row.items()}
        request = json.loads(fields["decode"])
        return cls(
            id=job_id,
            status=fields["status"],  # type: ignore[arg-type]
            decode=DecodeRequest(**{**request, "settings": Settings(**request["settings"])}),
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
            caller=fields.get("caller", ""),
            priority=fields.get("priority", "interactive"),  # type: ignore[arg-type]
            weight=float(fields.get("weight", 1)),
            worker=fields.get("worker", ""),
        )

    @classmethod
    def queued(
        cls,
        decode: DecodeRequest,
        request_id: str = "",
        traceparent: str = "",
        caller: str = "",
        priority: Priority = "interactive",
        weight: float = 1.0,
        eta_s: float = 0.0,
    ) -> "JobState":
        """The state of a new job."""
        return cls(
            id=decode.id,
            status="queued",
            decode=decode,
            step=0,
            total=decode.settings.steps,
            attempts=0,
            created=time.time(),
            started=0,
            ended=0,
            error="",
            fence=int(time.time() * 1e3),  # above the fences of any former record of this job
            request_id=request_id,
            traceparent=traceparent,
            caller=caller,
            priority=priority,
            weight=weight,
            eta_s=eta_s,
        )

    def new_record(self) -> dict[Any, Any]:
        """The hash to store for a new job."""
        return {
            "status": self.status,
            "decode": json.dumps(asdict(self.decode)),
            "step": self.step,
            "total": self.total,
            "attempts": self.attempts,
            "fence": self.fence,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "error": self.error,
            "work": self.decode.work,
            "request_id": self.request_id,
            "traceparent": self.traceparent,
            "caller": self.caller,
            "priority": self.priority,
            "weight": self.weight,
            "eta_s": self.eta_s,
        }


def ended_fields(status: Status, error: str) -> dict[Any, Any]:
    """The fields of a record that change when the job ends."""
    return {"status": status, "ended": time.time(), "error": error}
