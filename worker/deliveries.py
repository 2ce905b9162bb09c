"""Threads that write finished pictures to their targets in object stores.

They work beside the drawing, which never waits for a store.
"""

import logging
import random
import threading
import time
from dataclasses import replace

from models import image
from models.codec import bitstream
from models.errors import AfterimageError, WrongWeights
from models.image import MEDIA_TYPES
from models.library import Library, provenance
from worker.queue import counters
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

    def __init__(
        self,
        jobs: Jobs,
        objects: ObjectStores,
        max_pixels: int,
        library: Library | None = None,  # needed for a realism below 1
    ) -> None:
        self.jobs, self.objects, self.max_pixels, self.library = jobs, objects, max_pixels, library
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
            self._fail(state, target, e)
        else:
            self._paused.pop(ref.store, None)
            self.jobs.targets.settle(state, replace(target, status="written", etag=etag))
            log.info("job %s: wrote its target %s", state.id, ref)

    def _write(self, decode: DecodeRequest, target: Target, ref: Reference, png: bytes) -> str:
        self.objects.check(ref, target.caller, "write")  # the file of stores may have changed
        data = self._convert(decode, png, target)
        about = metadata(decode, target.format, target.realism)
        return self.objects.write(ref, data, MEDIA_TYPES[target.format], about)

    def _convert(self, decode: DecodeRequest, png: bytes, target: Target) -> bytes:
        if target.format == "png" and target.realism == 1:
            return png
        pixels = image.read(png, self.max_pixels)
        if target.realism != 1:
            pixels = self._mixed(decode, pixels, target.realism)
        ids = decode.codec, decode.decoder
        text = provenance(decode.tier, decode.settings, decode.seed, *ids, target.realism)
        return image.write(pixels, target.format, text)

    def _mixed(self, decode: DecodeRequest, pixels: image.Pixels, realism: float) -> image.Pixels:
        """Mix a finished picture with the instant one."""
        data = self.jobs.store.bitstream(decode.digest)
        if data is None or self.library is None:
            raise AfterimageError("the bitstream has expired; send it again")
        b = bitstream.parse(data, self.max_pixels)
        if self.library.codec_id(b) != decode.codec:
            raise WrongWeights(
                f"the worker lacks the codec {decode.codec}; send the bitstream again"
            )
        return self.library.at_realism(b, pixels, realism)

    def _try_again(self, state: JobState, target: Target, ref: Reference, e: StoreAway) -> None:
        """Postpone a target whose store failed; after the job's time limit, fail it."""
        failures = self._paused.get(ref.store, (0, 0.0))[0] + 1
        pause_s = min(2.0 ** (failures - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
        self._paused[ref.store] = failures, time.monotonic() + pause_s
        elapsed = time.time() - target.began
        if elapsed > self.jobs.timeout_s:
            self._fail(state, target, StoreAway(f"{e}; gave up after {elapsed:.0f} s"))
        else:
            counters.count(self.jobs.store, f"{counters.TARGETS}retried")
            self.jobs.targets.postpone(state.id, target, pause_s)

    def _fail(self, state: JobState, target: Target, e: AfterimageError) -> None:
        log.warning("job %s: its target %s failed: %s", state.id, target.reference, e)
        failed = replace(target, status="failed", error=str(e), kind=e.kind)
        self.jobs.targets.settle(state, failed)
