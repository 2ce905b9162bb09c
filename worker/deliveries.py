"""Threads that write finished pictures to their targets in object stores.

They work beside the drawing, which never waits for a store.
"""

import logging
import random
import threading
import time
from dataclasses import replace

from models import image
from models.errors import AfterimageError
from models.image import MEDIA_TYPES, OutputFormat
from models.library import provenance
from worker.queue.jobs import Jobs
from worker.queue.object_stores import ObjectStores
from worker.queue.records import DecodeRequest, JobState
from worker.queue.references import Reference, StoreAway
from worker.queue.results import metadata
from worker.queue.store import RedisError
from worker.queue.targets import Target

log = logging.getLogger(__name__)

THREADS = 4
"""Number of targets that a worker writes at once; most of the time is spent waiting for stores."""
MAX_BACKOFF_S = 60.0
"""Longest pause between two tries."""
NOT_READY_S = 2.0
"""Pause before another look at a job that is being drawn again."""
MAX_MISSES = 3
"""Number of looks after which the picture has expired; it may be about to be drawn again."""
RETRY_S = 1.0
"""Pause after an error of Redis."""


class Deliveries:
    """Writes the targets that are due, in `THREADS` threads."""

    def __init__(self, jobs: Jobs, objects: ObjectStores, max_pixels: int) -> None:
        self.jobs, self.objects, self.max_pixels = jobs, objects, max_pixels
        self._stopped = threading.Event()
        self._paused: dict[str, tuple[int, float]] = {}
        """Store that failed -> failures in a row, and when it may be tried again (monotonic)."""

    def start(self) -> None:
        """Start the threads, unless there are no stores."""
        for i in range(THREADS if self.objects.configs else 0):
            threading.Thread(target=self._run, name=f"delivery-{i}", daemon=True).start()

    def stop(self) -> None:
        """Begin no more writes. Other workers take those that this process does not finish."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self.deliver_one():
                    self.jobs.targets.wait()
            except RedisError as e:
                log.warning("targets cannot be written while Redis is down: %s", e)
                self._stopped.wait(RETRY_S)
            except Exception:
                log.exception("a target could not be written; it is tried again")
                self._stopped.wait(RETRY_S)

    def deliver_one(self) -> bool:
        """Write one target that is due; False if there is none. Raises `RedisError`."""
        claimed = self.jobs.targets.claim()
        if claimed is None:
            return False
        job_id, target = claimed
        state = self.jobs.record(job_id)
        if state is None or state.status in {"failed", "canceled"}:
            self.jobs.targets.release(job_id, target)
        elif state.status != "succeeded":
            self.jobs.targets.postpone(job_id, target, NOT_READY_S)
        else:
            self._deliver(state, replace(target, began=target.began or time.time()))
        return True

    def _deliver(self, state: JobState, target: Target) -> None:
        """Write a target, and record the result or when to try again."""
        ref = Reference.parse(target.reference, "target")
        _, until = self._paused.get(ref.store, (0, 0.0))
        if time.monotonic() < until:
            self.jobs.targets.postpone(state.id, target, until - time.monotonic())
            return
        png = self.jobs.store.picture(state.id)
        tries = target.tries + 1
        if png is None and tries < MAX_MISSES:
            self.jobs.targets.postpone(state.id, replace(target, tries=tries), NOT_READY_S)
            return
        try:
            if png is None:
                raise AfterimageError("the picture has expired; send the bitstream again")
            etag = self._write(state.decode, target, ref, png)
        except StoreAway as e:
            self._try_again(state, replace(target, tries=tries), ref, e)
        except AfterimageError as e:
            self._fail(state, target, str(e))
        else:
            self._paused.pop(ref.store, None)
            self.jobs.targets.settle(state, replace(target, status="written", etag=etag))
            log.info("job %s: wrote its target %s", state.id, ref)

    def _write(self, decode: DecodeRequest, target: Target, ref: Reference, png: bytes) -> str:
        self.objects.check(ref, target.caller, "write")  # the file of stores may have changed
        data = self._convert(decode, png, target.format)
        about = metadata(decode, target.format)
        return self.objects.write(ref, data, MEDIA_TYPES[target.format], about)

    def _convert(self, decode: DecodeRequest, png: bytes, format: OutputFormat) -> bytes:
        if format == "png":
            return png
        text = provenance(decode.tier, decode.settings, decode.seed, decode.codec, decode.decoder)
        return image.write(image.read(png, self.max_pixels), format, text)

    def _try_again(self, state: JobState, target: Target, ref: Reference, e: StoreAway) -> None:
        """Postpone a target whose store failed; after the job's time limit, fail it."""
        failures = self._paused.get(ref.store, (0, 0.0))[0] + 1
        pause_s = min(2.0 ** (failures - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
        self._paused[ref.store] = failures, time.monotonic() + pause_s
        elapsed = time.time() - target.began
        if elapsed > self.jobs.timeout_s:
            self._fail(state, target, f"{e}; gave up after {elapsed:.0f} s")
        else:
            self.jobs.targets.postpone(state.id, target, pause_s)

    def _fail(self, state: JobState, target: Target, error: str) -> None:
        log.warning("job %s: its target %s failed: %s", state.id, target.reference, error)
        self.jobs.targets.settle(state, replace(target, status="failed", error=error))
