"""The task that RQ runs for each job: `enhance`."""

import contextlib
import logging
import math
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rq.timeouts import JobTimeoutException
from torch import Tensor

from models import geometry
from models.codec import bitstream
from models.diffusion.decoder import WINDOW, DiffusionInput
from models.errors import AfterimageError, Canceled, WrongWeights
from models.geometry import STRIDE_Y
from worker import context
from worker.attempt import Attempt, LeaseLost
from worker.context import RETRY_S, ShutdownRequested, WorkerContext
from worker.drawing import DeviceLost, Drawing, OutOfMemory, encode, is_out_of_memory
from worker.queue import estimates
from worker.queue.jobs import MAX_CRASHES, QUARANTINED
from worker.queue.records import DecodeRequest, JobState
from worker.queue.store import RedisError
from worker.telemetry import logs, tracing

log = logging.getLogger(__name__)

LATE_S = 60.0
"""How long RQ's timeout may take to stop a drawing before the worker's heartbeat stops."""


def enhance(job_id: str) -> None:
    """Draw the picture of a queued job, in one batch with similar jobs where that is faster.

    Queued jobs name this function as `worker.tasks.enhance`.
    """
    worker = context.current()
    jobs = worker.jobs
    state = jobs.record(job_id)
    if state is None or state.status != "queued":
        return
    if not jobs.has_subscribers(job_id):
        worker.deferred.append(partial(jobs.cancel_unless_subscribed, job_id))
        return
    crashes = jobs.crash_count(state.decode.digest)
    if crashes >= MAX_CRASHES:
        jobs.fail_queued(job_id, QUARANTINED)
        return
    size = 1 if crashes else _batch_size(worker, state.decode)
    similar = jobs.claim_similar(state, size - 1) if size > 1 else []
    _attempt(worker, state, [job_id, *similar])


def _batch_size(worker: WorkerContext, decode: DecodeRequest) -> int:
    """Largest batch of pictures of this size; on a CPU as many as fit into one window."""
    if worker.library.diffusion.device.type == "cuda":
        return worker.batch
    height, width = geometry.padded(decode.height, decode.width)
    return min(worker.batch, max(1, WINDOW * STRIDE_Y**2 // (height * width)))


def _attempt(worker: WorkerContext, state: JobState, job_ids: Sequence[str]) -> None:
    """Begin an attempt at each job and run them as one batch; `state` is that of the first job.

    If Redis fails, the jobs are put back later.
    """
    owner = uuid.uuid4().hex
    attempts: list[Attempt] = []
    worker.heartbeat.attempts = attempts
    try:
        for job_id in job_ids:
            if attempt := Attempt.begin(worker.jobs, job_id, owner):
                attempts.append(attempt)
        if attempts:
            with request_context(state):
                _run(worker, attempts)
    except RedisError as e:
        log.warning("Redis failed; %d jobs will be put back: %s", len(attempts), e)
        worker.deferred += [partial(_put_back, worker, job_id, owner) for job_id in job_ids]
    finally:
        worker.heartbeat.attempts = ()


def _put_back(worker: WorkerContext, job_id: str, owner: str) -> None:
    """Put a job back if `owner` began it, even if the reply to that command was lost."""
    attempt = Attempt.find(worker.jobs, job_id, owner)
    if attempt is not None:
        attempt.put_back()


@contextlib.contextmanager
def request_context(state: JobState) -> Iterator[None]:
    """Log with the ids of the job and of the request that queued it, and continue its trace."""
    with (
        logs.bound(state.request_id, state.id),
        tracing.extract({"traceparent": state.traceparent}),
        tracing.span("decode job", "consumer", **{"afterimage.job_id": state.id}),
    ):
        yield


def _run(worker: WorkerContext, attempts: Sequence[Attempt]) -> None:
    """Draw and store a batch, and end or release its jobs after any error.

    Raises `RedisError`, with the attempts still running.
    """
    began = time.monotonic()
    worker.heartbeat.deadline = began + worker.jobs.timeout_s + LATE_S
    try:
        _draw(worker, attempts, began)
    except ShutdownRequested:
        log.info("shutting down: %d jobs are put back for other workers", len(attempts))
        worker.deferred += [attempt.put_back for attempt in attempts]
    except (OutOfMemory, DeviceLost) as e:
        log.error("this worker must exit: %s", e)
        worker.stopping = True
        worker.deferred += [attempt.record_crash for attempt in attempts]
    except JobTimeoutException:
        _fail(attempts, f"timed out after {worker.jobs.timeout_s} s")
    except RedisError:
        raise
    except Exception:
        _fail(attempts, "internal error")
        raise
    finally:
        worker.heartbeat.deadline = math.inf
        worker.drawing = None


def _draw(worker: WorkerContext, attempts: Sequence[Attempt], began: float) -> None:
    """Bitstreams -> latents -> pictures -> stores; only up to the pictures can it be interrupted.

    `began` is the time at which the batch began, of `time.monotonic()`.
    """
    cost = estimates.cost_model(worker.jobs)
    each_s = cost.seconds(attempts[0].state.decode.work) if cost else None
    worker.estimated_s = each_s and each_s * len(attempts)
    pictures = None
    with worker.interruptible():
        inputs = [(attempt, x) for attempt in attempts if (x := _input(worker, attempt))]
        if not inputs:
            return
        batch = [attempt for attempt, _ in inputs]
        worker.drawing = drawing = Drawing(batch)
        with contextlib.suppress(Canceled, LeaseLost):  # every job of the batch was dropped
            pictures = drawing.draw(worker.library.diffusion, [x for _, x in inputs])
    signal.alarm(0)  # RQ's timeout is for drawing; storing may take as long as Redis is down
    worker.heartbeat.deadline = math.inf
    for i, attempt in enumerate(batch):
        picture = None if pictures is None else pictures[i : i + 1]
        if _finish(worker, drawing, attempt, picture):
            worker.deferred.append(partial(_record_duration, attempt, began, len(batch)))


def _input(worker: WorkerContext, attempt: Attempt) -> DiffusionInput | None:
    """Latents and the codec's picture of a job; fails the job and returns None after an error."""
    decode, library = attempt.state.decode, worker.library
    data = worker.jobs.store.bitstream(decode.digest)
    try:
        if data is None:
            raise AfterimageError("the bitstream has expired; send it again")
        b = bitstream.parse(data, worker.max_pixels)
        if library.weights_ids(b) != (decode.codec, decode.decoder):
            raise WrongWeights(
                "the job was queued for other weights than this worker has; send the bitstream "
                "again"
            )
        return library.diffusion_input(b, decode.seed)
    except AfterimageError as e:
        _fail([attempt], str(e))
    except JobTimeoutException:
        raise
    except Exception as e:  # only this job fails, not the batch
        if is_out_of_memory(e):
            raise OutOfMemory(f"decoding the latents of {decode.width}x{decode.height}") from e
        log.exception("job %s: decoding its latents failed", attempt.id)
        _fail([attempt], "internal error")
    return None


def _finish(
    worker: WorkerContext, drawing: Drawing, attempt: Attempt, picture: Tensor | None
) -> bool:
    """Store a job's picture, or release the job if it was dropped.

    Returns True if the picture was stored at the first try.
    """
    reason = drawing.dropped.get(attempt.id)
    if isinstance(reason, LeaseLost):
        worker.deferred.append(partial(worker.jobs.forgive_worker, attempt.state))
        return False
    if picture is None or (reason and not _has_subscribers(worker, attempt)):
        worker.deferred.append(attempt.cancel)
        return False
    return store_result(worker, attempt, encode(attempt.state.decode, picture, "png"))


def _has_subscribers(worker: WorkerContext, attempt: Attempt) -> bool:
    """True if the job got subscribers again; also while Redis is down, to keep the picture."""
    try:
        return worker.jobs.has_subscribers(attempt.id)
    except RedisError:
        return True


def store_result(worker: WorkerContext, attempt: Attempt, png: bytes) -> bool:
    """Commit a picture; retry while a store is down. Returns True if the first try succeeded.

    Between the tries the picture is in the spool too: if this process exits, another commits it.
    """
    try:
        return _commit(worker, attempt, png)
    except RedisError as e:
        log.warning("job %s: its picture is spooled while Redis is down: %s", attempt.id, e)
    file = _spool(worker, attempt, png)
    while True:
        time.sleep(RETRY_S)
        if worker.stopping:
            return False  # the spooled file remains
        with contextlib.suppress(RedisError):
            _commit(worker, attempt, png)
            break
    if file is not None:
        file.unlink(missing_ok=True)
    return False


def _commit(worker: WorkerContext, attempt: Attempt, png: bytes) -> bool:
    """Commit a picture; False if the lease is lost. Raises `RedisError`."""
    try:
        attempt.commit(png)
    except LeaseLost as e:
        log.info("job %s: its picture is dropped: %s", attempt.id, e)
        worker.deferred.append(partial(worker.jobs.forgive_worker, attempt.state))
        return False
    log.info("job %s: succeeded after %d steps", attempt.id, attempt.state.total)
    return True


def _spool(worker: WorkerContext, attempt: Attempt, png: bytes) -> Path | None:
    """The spooled picture; None if the file cannot be written: the picture is in memory only."""
    try:
        return worker.spool.save(attempt, png)
    except OSError as e:
        log.warning("job %s: its picture cannot be spooled: %s", attempt.id, e)
        return None


def _record_duration(attempt: Attempt, began: float, batch_size: int) -> None:
    """Record the job's share of the time until the worker is free again."""
    attempt.record_duration((time.monotonic() - began) / batch_size)


def _fail(attempts: Sequence[Attempt], error: str) -> None:
    for attempt in attempts:
        with contextlib.suppress(LeaseLost):
            attempt.fail(error)
