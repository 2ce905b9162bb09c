"""Targets of requests: the API writes to them, and asks whether they hold a picture already."""

import contextlib
from dataclasses import dataclass

import anyio
import anyio.to_thread
from fastapi import Response
from fastapi.responses import JSONResponse

from models.image import OutputFormat
from service.services import Services
from service.target_schemas import Written
from worker.queue.references import Reference, StoreAway, StoreRefused

HEAD_S = 5.0
"""How long a request waits to learn whether its target is there already."""
_THREADS = anyio.CapacityLimiter(16)
"""Threads that write to stores or ask them about an object; separate, since stores may be slow."""


@dataclass(frozen=True, slots=True)
class PictureTarget:
    """Where a picture is to be written, and in which format."""

    reference: Reference
    format: OutputFormat


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
            if (t.reference, t.format) == (str(target.reference), target.format)
        } - {""}
        same = found.attributes.get("decode") == job_id
        same = same and found.attributes.get("format") == target.format
        return found.etag if same or found.etag in written else None

    with anyio.move_on_after(HEAD_S):
        return await anyio.to_thread.run_sync(find, limiter=_THREADS, abandon_on_cancel=True)
    return None
