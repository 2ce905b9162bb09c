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
from models.folders import UntrustedFolder
from models.geometry import STRIDE_Y
from worker import context
from worker.attempt import Attempt, LeaseLost
from worker.context import RETRY_S, ShutdownRequested, WorkerContext
from worker.drawing import DeviceLost, Drawing, OutOfMemory, encode, is_out_of_memory
from worker.queue import estimates
from worker.queue.quarantine import MAX_CRASHES, QUARANTINED
from worker.queue.records import DecodeRequest, JobState
from worker.queue.store import RedisError
from worker.telemetry import logs, tracing

log = logging.getLogger(__name__)

LATE_S = 60.0
"""Time beyond the job's timeout in which RQ must have stopped the drawing. After it the heartbeat
stops, and another worker takes the job."""


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
    crashes = jobs.quarantine.count(state.decode.digest)
    if crashes >= MAX_CRASHES:
        jobs.fail_queued(job_id, QUARANTINED)
        return
    size = 1 if crashes else _batch_size(worker, state.decode)
    similar = jobs.claim_similar(state, size - 1) if size > 1 else []
    _attempt(worker, state, [job_id, *similar])


def _batch_size(worker: WorkerContext, decode: DecodeRequest) -> int:
    """Largest batch of pictures of this size; on a CPU they must fit into one window together."""
    if worker.library.device.type == "cuda":
        return worker.batch
    height, width = geometry.padded(decode.height, decode.width)
    return min(worker.batch, max(1, WINDOW * STRIDE_Y**2 // (height * width)))


def _attempt(worker: WorkerContext, state: JobState, job_ids: Sequence[str]) -> None:
    """Begin an attempt at each job and run them as one batch; `state` is that of the first job.

    If Redis fails, a deferred action puts the jobs back into the queue.
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
    """Put a job back if `owner` began an attempt at it, even if that command's reply was lost."""
    attempt = Attempt.find(worker.jobs, job_id, owner)
    if attempt is not None:
        attempt.put_back()


@contextlib.contextmanager
def request_context(state: JobState) -> Iterator[None]:
    """Add the ids of the job and of the request that queued it to logs; continue its trace."""
    with (
        logs.bound(state.request_id, state.id),
        tracing.extract({"traceparent": state.traceparent}),
        tracing.span("decode job", "consumer", **{"afterimage.job_id": state.id}),
    ):
        yield


def _run(worker: WorkerContext, attempts: Sequence[Attempt]) -> None:
    """Draw and store a batch, and end or release its jobs after any error.

    Raises `RedisError`; the attempts then still have the status `running`.
    """
    began = time.monotonic()
    worker.heartbeat.deadline = began + worker.jobs.timeout_s + LATE_S
    try:
        attempts = _recall(worker, attempts)
        if attempts:
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
    """Decode the latents of all jobs, draw their pictures and store them.

    Signals can interrupt decoding and drawing, but not storing. `began` is the value of
    `time.monotonic()` at the beginning of the batch.
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
            decoder = worker.library.decoder(attempts[0].state.decode.settings)
            pictures = drawing.draw(decoder, [x for _, x in inputs])
    _end_time_limit(worker)
    for i, attempt in enumerate(batch):
        picture = None if pictures is None else pictures[i : i + 1]
        if _finish(worker, drawing, attempt, picture):
            worker.deferred.append(partial(_record_duration, attempt, began, len(batch)))


def _recall(worker: WorkerContext, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
    """Commit the pictures that the results hold; return the attempts that have to draw theirs."""
    results = worker.jobs.store.results
    if results is None:
        return attempts
    kept = {a.id: png for a in attempts if (png := results.read(a.id)) is not None}
    if len(kept) == len(attempts):
        _end_time_limit(worker)
    for attempt in attempts:
        if attempt.id in kept:
            store_result(worker, attempt, kept[attempt.id])
    return [a for a in attempts if a.id not in kept]


def _end_time_limit(worker: WorkerContext) -> None:
    """End RQ's timeout, which limits drawing; storing waits while Redis is down."""
    signal.alarm(0)
    worker.heartbeat.deadline = math.inf


def _input(worker: WorkerContext, attempt: Attempt) -> DiffusionInput | None:
    """Decode a job's latents and the codec's picture; after an error, fail the job, return None."""
    decode, library = attempt.state.decode, worker.library
    data = worker.jobs.store.bitstream(decode.digest)
    try:
        if data is None:
            raise AfterimageError("the bitstream has expired; send it again")
        b = bitstream.parse(data, worker.max_pixels)
        if library.weights_ids(b, decode.settings) != (decode.codec, decode.decoder):
            raise WrongWeights(
                f"the job was queued for codec {decode.codec} and decoder {decode.decoder}, which "
                "this worker does not have; send the bitstream again"
            )
        return library.diffusion_input(b, decode.settings, decode.seed)
    except AfterimageError as e:
        _fail([attempt], str(e))
    except JobTimeoutException:
        raise
    except Exception as e:  # only this job fails, not the batch
        if is_out_of_memory(e):
            size = f"{decode.width}×{decode.height}"
            raise OutOfMemory(f"out of memory while decoding the latents of {size} pixels") from e
        log.exception("job %s: its latents could not be decoded", attempt.id)
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
        worker.deferred.append(partial(worker.jobs.quarantine.forgive, attempt.state))
        return False
    if picture is None or (reason and not _has_subscribers(worker, attempt)):
        worker.deferred.append(attempt.cancel)
        return False
    return store_result(worker, attempt, encode(attempt.state.decode, picture, "png"))


def _has_subscribers(worker: WorkerContext, attempt: Attempt) -> bool:
    """True if the job has subscribers again, or if Redis is down: then the picture is kept."""
    try:
        return worker.jobs.has_subscribers(attempt.id)
    except RedisError:
        return True


def store_result(worker: WorkerContext, attempt: Attempt, png: bytes) -> bool:
    """Commit a picture; retry while a store is down. Returns True if the first try succeeded.

    Meanwhile the picture is also in the spool: if this process exits, another worker commits it.
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
        worker.deferred.append(partial(worker.jobs.quarantine.forgive, attempt.state))
        return False
    log.info("job %s: succeeded after %d steps", attempt.id, attempt.state.total)
    return True


def _spool(worker: WorkerContext, attempt: Attempt, png: bytes) -> Path | None:
    """Write a picture to the spool and return its file; None if it cannot be written.

    The picture is then in memory only.
    """
    try:
        return worker.spool.save(attempt, png)
    except (OSError, UntrustedFolder) as e:
        log.warning("job %s: its picture cannot be spooled: %s", attempt.id, e)
        return None


def _record_duration(attempt: Attempt, began: float, batch_size: int) -> None:
    """Record the job's share of the time that its batch took, until the worker is free again."""
    attempt.record_duration((time.monotonic() - began) / batch_size)


def _fail(attempts: Sequence[Attempt], error: str) -> None:
    for attempt in attempts:
        with contextlib.suppress(LeaseLost):
            attempt.fail(error)
