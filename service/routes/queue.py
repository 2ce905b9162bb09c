"""`/v1/queue`, for operators: what waits and runs, and changes to it."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Response

from models.errors import ParameterError, Quarantined
from service import operators, problems, queue_schemas, queue_view, schemas, watching
from service.deps import ONLY_KNOWN, JobId, OperateCaller, ServicesDep
from service.problems import Conflict, JobNotFound, WorkerNotFound
from service.services import Services
from worker.queue.records import JobState

router = APIRouter(prefix="/v1/queue", tags=["queue"], dependencies=[ONLY_KNOWN])

_PROBLEMS = (*problems.OF_AUTHENTICATION, ParameterError, problems.QueueAway)

Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", examples=["e3b0c442" * 8])]
WorkerName = Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,255}$", examples=["gpu-1-42"])]


@router.get("", summary="See the queue", responses=problems.responses(*_PROBLEMS))
async def queue(
    services: ServicesDep, caller: OperateCaller, response: Response
) -> queue_schemas.Queue:
    """Waiting jobs by priority and caller, running jobs, workers, and quarantined bitstreams."""
    response.headers["Cache-Control"] = "no-store"
    return await anyio.to_thread.run_sync(queue_view.view, services)


@router.delete(
    "/jobs/{id}",
    summary="Cancel a decode for all callers",
    responses=problems.responses(*_PROBLEMS, JobNotFound, Conflict),
)
async def cancel_job(services: ServicesDep, caller: OperateCaller, id: JobId) -> schemas.Decode:
    """Cancel a decode, whoever waits for it. A running one stops at its next step."""
    return await anyio.to_thread.run_sync(lambda: _view(services, operators.cancel(services, id)))


@router.post(
    "/jobs/{id}/retry",
    status_code=202,
    summary="Retry a decode of any caller",
    responses=problems.responses(*_PROBLEMS, JobNotFound, Conflict, Quarantined),
)
async def retry_job(services: ServicesDep, caller: OperateCaller, id: JobId) -> schemas.Decode:
    """Queue a decode again for the caller that submitted it, if it failed, was canceled, or its
    picture has expired."""
    return await anyio.to_thread.run_sync(lambda: _view(services, operators.retry(services, id)))


@router.delete(
    "/quarantine/{digest}",
    summary="Release a bitstream from quarantine",
    responses=problems.responses(*_PROBLEMS, Conflict),
)
async def release_bitstream(
    services: ServicesDep, caller: OperateCaller, digest: Digest
) -> queue_schemas.QuarantinedBitstream:
    """Accept a bitstream again on which workers have crashed. Its digest is its SHA-256."""
    return await anyio.to_thread.run_sync(operators.release, services, digest)


@router.post(
    "/workers/{name}/drain",
    summary="Drain a worker",
    responses=problems.responses(*_PROBLEMS, WorkerNotFound),
)
async def drain_worker(
    services: ServicesDep, caller: OperateCaller, name: WorkerName
) -> queue_schemas.QueueWorker:
    """Let a worker finish its job and take no other until it is restarted."""
    return await anyio.to_thread.run_sync(operators.drain, services, name)


def _view(services: Services, state: JobState) -> schemas.Decode:
    """The view of a decode as its own caller sees it."""
    return watching.view(services, state, state.caller)
