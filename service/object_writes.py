"""Targets of requests: the API writes to them, and asks whether they hold a picture already."""

import contextlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import anyio
import anyio.to_thread
from fastapi import Response
from fastapi.responses import JSONResponse

from models.errors import ParameterError
from models.image import SUFFIXES, OutputFormat
from service.services import Services
from service.target_schemas import Written
from worker.queue.references import Reference, StoreAway, StoreRefused
from worker.queue.targets import Target

HEAD_S = 5.0
"""How long a request waits to learn whether its target is there already."""
_THREADS = anyio.CapacityLimiter(16)
"""Threads that write to stores or ask them about an object; separate, since stores may be slow."""


@dataclass(frozen=True, slots=True)
class PictureTarget:
    """Where a picture is to be written, in which format, and how realistic."""

    reference: Reference
    format: OutputFormat
    realism: float = 1.0

    def of(self, caller: str, etag: str = "") -> Target:
        """The record of this target for a caller; with an `etag`, it is written already."""
        status: Literal["pending", "written"] = "written" if etag else "pending"
        return Target(caller, str(self.reference), self.format, status, etag, realism=self.realism)


def format_of(target: Reference, parameter: str = "target") -> OutputFormat:
    """The format that the suffix of a target names.

    Raises `ParameterError`, which names the `parameter`.
    """
    format = SUFFIXES.get(PurePosixPath(target.key).suffix.lower())
    if format is None:
        suffixes = ", ".join(SUFFIXES)
        raise ParameterError(
            f"{parameter}: the key {target.key[-100:]!r} ends with none of {suffixes}; use one of "
            "them, or set format"
        )
    return format


async def written_response(
    services: Services,
    reference: Reference,
    data: bytes,
    media_type: str,
    about: dict[str, str],
    headers: dict[str, str],
) -> Response:
    """Write an object, and return 200 with a document about it. Raises `StoreError`."""
    arguments = reference, data, media_type, about
    etag = await anyio.to_thread.run_sync(services.objects.write, *arguments, limiter=_THREADS)
    document = Written(target=str(reference), media_type=media_type, bytes=len(data), etag=etag)
    return JSONResponse(document.model_dump(mode="json"), 200, headers)


async def exists(services: Services, reference: Reference) -> bool:
    """Whether there is an object. Raises `StoreError`."""
    found = await anyio.to_thread.run_sync(
        services.objects.head, reference, limiter=_THREADS, abandon_on_cancel=True
    )
    return found is not None


async def holds(services: Services, target: PictureTarget, caller: str, job_id: str) -> str | None:
    """The ETag of a target that already holds the picture of this job; else None.

    Its metadata, or the ETag that was recorded when it was written, tell. Also None if the store
    does not say so within `HEAD_S`: it may be away, or its credentials only be for writing.
    """

    def find() -> str | None:
        found = None
        with contextlib.suppress(StoreAway, StoreRefused):
            found = services.objects.head(target.reference)
        if found is None:
            return None
        written = {
            t.etag
            for t in services.jobs.targets.of(job_id, caller)
            if (t.reference, t.format, t.realism)
            == (str(target.reference), target.format, target.realism)
        } - {""}
        about = found.attributes
        same = about.get("decode") == job_id and about.get("format") == target.format
        same = same and about.get("realism", "1.0") == str(target.realism)
        return found.etag if same or found.etag in written else None

    with anyio.move_on_after(HEAD_S):
        return await anyio.to_thread.run_sync(find, limiter=_THREADS, abandon_on_cancel=True)
    return None
