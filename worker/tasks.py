"""The one function that a job runs."""

import logging
import threading
import time

from torch import Tensor

from models import bitstream, image
from models.errors import AfterimageError
from worker.jobs import BEAT_S, Decode, Jobs
from worker.runtime import Runtime
from worker.store import StoreDown

log = logging.getLogger(__name__)


class Keeper(threading.Thread):
    """Keeps the lease of this worker's job, and reaps those of workers that fell silent."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__(name="keeper", daemon=True)
        self.jobs = jobs
        self.current: str | None = None

    def run(self) -> None:
        while True:
            time.sleep(BEAT_S)
            try:
                if self.current is not None:
                    self.jobs.beat(self.current)
                self.jobs.reap()
            except StoreDown as e:
                log.warning("the queue cannot be reached: %s", e)


class Context:
    """What the worker process prepared before its first job."""

    jobs: Jobs
    runtime: Runtime
    keeper: Keeper


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
    jobs.started(job_id)
    Context.keeper.current = job_id

    def on_step(step: int, _steps: int, _picture: Tensor) -> None:
        jobs.progress(job_id, step)

    try:
        pixels = Context.runtime.perceptual(
            bitstream.parse(data), state.decode.settings, state.decode.seed, on_step
        )
    except AfterimageError as e:
        log.warning("job %s failed: %s", job_id, e)
        jobs.failed(job_id, str(e))
    except Exception:
        jobs.failed(job_id, "internal error")
        raise
    else:
        jobs.succeeded(job_id, image.write(pixels, "png", provenance(state.decode)))
    finally:
        Context.keeper.current = None


def provenance(decode: Decode) -> dict[str, str]:
    """PNG text that says what a synthesised picture is."""
    settings = decode.settings
    return {
        "Software": "Afterimage",
        "Comment": "synthesised detail: drawn by a diffusion decoder, not recorded by a camera",
        "afterimage:tier": decode.tier,
        "afterimage:sampler": f"{settings.sampler} eta={settings.eta} gamma={settings.gamma} "
        f"beta={settings.beta}",
        "afterimage:steps": str(settings.steps),
        "afterimage:seed": str(decode.seed),
        "afterimage:weights": f"codec {decode.codec}, decoder {decode.decoder}",
    }
