"""The one function that a job runs."""

import contextlib
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rq.timeouts import JobTimeoutException

from models import geometry
from models.codec import bitstream
from models.diffusion.decoder import WINDOW, DiffusionInput
from models.errors import AfterimageError, Canceled, WrongWeights
from models.geometry import STRIDE_Y
from models.library import Library
from worker.attempt import Attempt, LeaseLost
from worker.drawing import DeviceLost, Drawing, OutOfMemory, file, short_of_memory
from worker.heartbeat import Keeper
from worker.queue import estimates
from worker.queue.jobs import DEATHS, QUARANTINED, Jobs
from worker.queue.records import Decode, JobState
from worker.queue.store import RedisError
from worker.spool import Spool
from worker.telemetry import logs, tracing

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""How long a worker that is to end waits for the queue, to put its job back."""
RETRY_S = 0.5
"""Between two tries to hand over a picture while a store is away."""
LATE_S = 60.0
"""How long RQ's time limit may take to stop a drawing before the worker counts as dead."""


class ShutdownRequested(BaseException):
    """The process is to end before this job can: another worker draws it. Raised by a signal."""


def left_s() -> float | None:
    """Seconds until the end of what runs now; None where nobody can say."""
    drawing = Context.drawing
    known = drawing.left_s() if drawing else None
    return Context.expected_s if known is None else known


class Context:
    """What the worker process prepared before its first job, and what it does now."""

    jobs: Jobs
    library: Library
    keeper: Keeper
    spool: Spool
    max_pixels: int
    batch: int = 1
    grace_s: float = 30.0
    drawing: Drawing | None = None
    expected_s: float | None = None  # of what runs, before its first step tells better
    interruptible: bool = False  # `ShutdownRequested` may be raised
    asked: float | None = None  # when this process was first told to end
    stopping: bool = False  # set by signals: an Event's lock could be held by what they interrupt
    afterwards: list[Callable[[], None]] = []  # once RQ has dropped its own note of the job


def enhance(job_id: str) -> None:
    """Draw the picture of a job, and of others like it where the device gains from that."""
    jobs = Context.jobs
    state = jobs.record(job_id)
    if state is None or state.status != "queued":
        return
    if not jobs.has_subscribers(job_id):
        Context.afterwards.append(lambda: jobs.drop(job_id))
        return
    if jobs.crash_count(state.decode.digest) >= DEATHS:
        jobs.fail_queued(job_id, QUARANTINED)
        return
    alone = Context.batch < 2 or jobs.crash_count(state.decode.digest)
    alike = [] if alone else jobs.claim_alike(state, _together(state.decode) - 1)
    attempts: list[Attempt] = []
    owner = uuid.uuid4().hex
    Context.keeper.attempts = attempts
    try:
        for name in (job_id, *alike):
            if attempt := Attempt.begin(jobs, name, owner):
                attempts.append(attempt)
        if attempts:
            with _told(state):
                _run(attempts)
    except RedisError as e:
        log.warning("the queue went away: %d jobs are put back: %s", len(attempts), e)
        Context.afterwards += [partial(_leave, name, owner) for name in (job_id, *alike)]
    finally:
        Context.keeper.attempts = ()


def _together(d: Decode) -> int:
    """How many like it are drawn at once: on CPUs no more than fit into one window."""
    if Context.library.diffusion.device.type == "cuda":
        return Context.batch
    height, width = geometry.padded(d.height, d.width)
    return min(Context.batch, max(1, WINDOW * STRIDE_Y**2 // (height * width)))


def _leave(job_id: str, owner: str) -> None:
    """What `owner` began, perhaps without having heard so, is for others to draw."""
    attempt = Attempt.held(Context.jobs, job_id, owner)
    if attempt is not None:
        _settled(attempt.put_back)()


def settle() -> None:
    """What waited until RQ had dropped its own note of the job: it may be queued again now."""
    patience = time.monotonic() + PATIENCE_S
    while Context.afterwards:
        try:
            Context.afterwards[0]()
        except RedisError as e:
            log.warning("a job cannot be put back yet: %s", e)
            if Context.stopping and time.monotonic() > patience:
                return  # its lease will end
            time.sleep(RETRY_S)
            continue
        except Exception:
            log.exception("a job cannot be put back")
        Context.afterwards.pop(0)


@contextlib.contextmanager
def _told(state: JobState) -> Iterator[None]:
    """Log and trace as a part of the request that queued the job."""
    origin = {"traceparent": state.traceparent}
    with (
        logs.bound(state.request_id, state.id),
        tracing.extract(origin),
        tracing.span("decode job", "consumer", **{"afterimage.job_id": state.id}),
    ):
        yield


def _run(attempts: Sequence[Attempt]) -> None:
    """Record -> bitstream -> latents -> sampler -> PNG -> store, each with its own end.

    Raises `RedisError`: the attempts are as they were.
    """
    began = time.monotonic()
    Context.keeper.until = began + Context.jobs.timeout_s + LATE_S
    try:
        cost = estimates.model(Context.jobs)
        each_s = cost.seconds(attempts[0].state.decode.work) if cost else None
        Context.expected_s = each_s and each_s * len(attempts)
        Context.interruptible = True
        if Context.stopping:
            raise ShutdownRequested
        drafts = [(attempt, draft) for attempt in attempts if (draft := _draft(attempt))]
        if drafts:
            _draw([a for a, _ in drafts], [d for _, d in drafts], began)
    except ShutdownRequested:
        Context.interruptible = False
        log.info("%d jobs are left to other workers", len(attempts))
        Context.afterwards += [_settled(attempt.put_back) for attempt in attempts]
    except (OutOfMemory, DeviceLost) as e:
        Context.interruptible = False
        log.error("this worker ends: %s", e)
        Context.stopping = True
        Context.afterwards += [_settled(attempt.blame) for attempt in attempts]
    except JobTimeoutException:
        Context.interruptible = False
        _fail(attempts, f"it took longer than {Context.jobs.timeout_s} s")
    except RedisError:
        Context.interruptible = False
        raise
    except Exception:
        Context.interruptible = False
        _fail(attempts, "internal error")
        raise
    finally:
        Context.interruptible = False
        Context.keeper.until = math.inf
        Context.drawing = None


def _draft(attempt: Attempt) -> DiffusionInput | None:
    """Latents and the codec's picture; None where the job has failed for want of them."""
    decode, library = attempt.state.decode, Context.library
    data = Context.jobs.store.bitstream(decode.digest)
    try:
        if data is None:
            raise AfterimageError("the bitstream is no longer kept; send it again")
        b = bitstream.parse(data, Context.max_pixels)
        if library.weights_ids(b) != (decode.codec, decode.decoder):
            raise WrongWeights(
                "it was queued for other weights than this worker has; send it again"
            )
        return library.diffusion_input(b, decode.seed)
    except AfterimageError as e:
        _fail([attempt], str(e))
    except JobTimeoutException:
        raise
    except Exception as e:  # others are drawn with it
        if short_of_memory(e):
            raise OutOfMemory(f"latents of {decode.width}x{decode.height} pixels") from e
        log.exception("no latents for job %s", attempt.id)
        _fail([attempt], "internal error")
    return None


def _draw(attempts: Sequence[Attempt], drafts: Sequence[DiffusionInput], began: float) -> None:
    Context.drawing = drawing = Drawing(attempts)
    try:
        pictures = drawing.draw(Context.library.diffusion, drafts)
    except (Canceled, LeaseLost):
        pictures = None  # all of them were dropped
    Context.interruptible = False
    signal.alarm(0)  # RQ's limit is on drawing: what is drawn waits for its store
    Context.keeper.until = math.inf
    for i, attempt in enumerate(attempts):
        why = drawing.dropped.get(attempt.id)
        if isinstance(why, LeaseLost):
            Context.afterwards.append(partial(Context.jobs.forgive_worker, attempt.state))
        elif pictures is None or (why and not _wanted_again(attempt)):
            Context.afterwards.append(_settled(attempt.stop))
        else:
            png = file(attempt.state.decode, pictures[i : i + 1], "png")
            _hand_over(attempt, png, began, len(attempts))


def _wanted_again(attempt: Attempt) -> bool:
    """Whether somebody came after nobody waited; where nobody can say, the picture is not lost."""
    try:
        return Context.jobs.has_subscribers(attempt.id)
    except RedisError:
        return True


def _hand_over(attempt: Attempt, png: bytes, began: float, together: int) -> None:
    """Commit a picture; while a store is away it lies in a file, where others find it if we end."""
    file, waited = None, False
    while True:
        try:
            attempt.commit(png)
            log.info("job %s: %d steps drawn", attempt.id, attempt.state.total)
            if not waited:
                Context.afterwards.append(partial(_measure, attempt, began, together))
            break
        except LeaseLost as e:
            log.info("job %s is not ours any more: %s", attempt.id, e)
            Context.afterwards.append(partial(Context.jobs.forgive_worker, attempt.state))
            break
        except RedisError as e:
            if not waited:
                log.warning("job %s: its picture is kept until it can be stored: %s", attempt.id, e)
                file, waited = _kept(attempt, png), True
            time.sleep(RETRY_S)
            if Context.stopping:
                return
    if file is not None:
        file.unlink(missing_ok=True)


def _kept(attempt: Attempt, png: bytes) -> Path | None:
    """Its file; None where none can be written: then it is in memory alone."""
    try:
        return Context.spool.keep(attempt, png)
    except OSError as e:
        log.warning("job %s: no file for its picture: %s", attempt.id, e)
        return None


def _measure(attempt: Attempt, began: float, together: int) -> None:
    """What the job took until the worker was free again."""
    attempt.measured((time.monotonic() - began) / together)


def _fail(attempts: Sequence[Attempt], error: str) -> None:
    for attempt in attempts:
        with contextlib.suppress(LeaseLost):
            attempt.fail(error)


def _settled(change: Callable[[], object]) -> Callable[[], None]:
    def settle() -> None:
        with contextlib.suppress(LeaseLost):
            change()

    return settle
