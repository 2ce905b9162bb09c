"""The one function that a job runs."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from rq.timeouts import JobTimeoutException
from torch import Tensor

from models import bitstream, codec, image
from models.errors import AfterimageError, Canceled, WrongWeights
from models.library import Library, provenance
from worker import logs, tracing
from worker.jobs import BEAT_S, Jobs
from worker.records import Decode, JobState
from worker.store import RedisError

log = logging.getLogger(__name__)

PREVIEW_S = 1.0
"""At least so long from one preview to the next: drawing one takes some hundredths of a second."""


class Keeper(threading.Thread):
    """Keeps the lease of this worker's job, and looks for jobs that other workers left."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__(name="keeper", daemon=True)
        self.jobs = jobs
        self.current: str | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        lost: set[str] = set()
        while not self.stopped.wait(BEAT_S):
            try:
                if self.current is not None:
                    self.jobs.beat(self.current)
                self.jobs.reap()
                # between a worker's taking a job and its saying so the job is nowhere, for an
                # instant: only what is nowhere twice is lost
                found = self.jobs.astray()
                self.jobs.requeue(found & lost)
                lost = found - lost
            except RedisError as e:
                log.warning("the queue cannot be used: %s", e)


class Previews:
    """Estimates of a running job, for those who read its events: small files, not too often."""

    def __init__(self, jobs: Jobs, job_id: str, decode: Decode) -> None:
        self.jobs, self.job_id, self.decode = jobs, job_id, decode
        self.drawn = time.monotonic()

    def draw(self, step: int, steps: int, picture: Callable[[], Tensor]) -> None:
        """Keep the estimate, unless the last is younger than `PREVIEW_S`."""
        if time.monotonic() - self.drawn < PREVIEW_S:
            return
        self.drawn = time.monotonic()
        pixels = codec.to_pixels(codec.crop(picture(), self.decode.height, self.decode.width))
        self.jobs.preview(self.job_id, step, steps, image.write(pixels, "webp"))


class Context:
    """What the worker process prepared before its first job."""

    jobs: Jobs
    library: Library
    keeper: Keeper
    max_pixels: int


def enhance(job_id: str) -> None:
    """Draw the picture of a job: record -> bitstream -> latents -> sampler -> PNG -> store."""
    jobs = Context.jobs
    state = jobs.get(job_id)
    if state is None or state.status not in {"queued", "running"}:
        return
    data = jobs.store.bitstream(state.decode.digest)
    if data is None:
        jobs.failed(job_id, "the bitstream is no longer kept; send it again")
        return
    origin = {"traceparent": state.traceparent}
    with (
        logs.bound(state.request_id, job_id),
        tracing.extract(origin),
        tracing.span("decode job", "consumer", **{"afterimage.job_id": job_id}),
    ):
        _run(jobs, state, data)


def _run(jobs: Jobs, state: JobState, data: bytes) -> None:
    job_id = state.id
    if not jobs.wanted(job_id):
        jobs.unwanted(job_id)
        return
    jobs.started(job_id)
    Context.keeper.current = job_id
    previews = Previews(jobs, job_id, state.decode)

    def on_step(step: int, steps: int, picture: Callable[[], Tensor]) -> None:
        with contextlib.suppress(RedisError):  # progress is worth less than the work
            wish = jobs.progress(job_id, step, steps)
            if not wish.wanted:
                raise Canceled("nobody waits for the picture any more")
            if wish.watched and step < steps:
                previews.draw(step, steps, picture)

    try:
        png = _draw(state.decode, data, on_step)
    except Canceled:
        jobs.unwanted(job_id)
    except AfterimageError as e:
        log.warning("job %s failed: %s", job_id, e)
        jobs.failed(job_id, str(e))
    except JobTimeoutException:
        jobs.failed(job_id, f"it took longer than {jobs.timeout_s} s")
    except Exception:
        jobs.failed(job_id, "internal error")
        raise
    else:
        jobs.succeeded(job_id, png)
        log.info("job %s: %d steps drawn", job_id, state.decode.settings.steps)
    finally:
        Context.keeper.current = None


def _draw(
    decode: Decode, data: bytes, on_step: Callable[[int, int, Callable[[], Tensor]], None]
) -> bytes:
    """The PNG file that `decode` asks for; `WrongWeights` where ours are not the ones it names."""
    library = Context.library
    b = bitstream.parse(data, Context.max_pixels)
    ids = library.weights_ids(b)
    if ids != (decode.codec, decode.decoder):
        raise WrongWeights("it was queued for other weights than this worker has; send it again")
    pixels = library.perceptual(b, decode.settings, decode.seed, on_step)
    return image.write(pixels, "png", provenance(decode.tier, decode.settings, decode.seed, *ids))
