"""Finished pictures in an object store: they outlive the cache, which may evict them.

The setting `results` names the store and a prefix; a picture is the object `PREFIX/JOB_ID.png`.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from models.errors import AfterimageError
from models.image import MEDIA_TYPES, OutputFormat
from models.pictures import signatures
from worker.queue import object_stores
from worker.queue.object_config import StoresError
from worker.queue.object_stores import ObjectStores
from worker.queue.records import DecodeRequest
from worker.queue.references import ObjectNotFound, Reference, StoreAway
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

READ_S = 5
"""How long a read may take: requests wait for it."""
PAUSE_S = 10
"""How long the store is not used after it has failed, so that nothing waits for it."""
MAX_WAITING = 16
"""Number of pictures that wait to be written; more are not written."""
CLOSE_S = 5
"""How long a worker that exits waits for these."""
MAX_PIXEL_BYTES, MAX_METADATA_BYTES = 4, 2**20
"""Largest size of a picture: PNG without compression, and what surrounds the pixels."""


class Results:
    """The finished pictures in the object store."""

    def __init__(self, objects: ObjectStores, folder: Reference, max_pixels: int) -> None:
        self._objects, self._folder = objects, folder
        self._readable = object_stores.impatient(objects, folder.store, READ_S)
        self._limit = MAX_PIXEL_BYTES * max_pixels + MAX_METADATA_BYTES
        self._paused_until = 0.0  # on the clock of time.monotonic(); 0 while the store responds
        self._writes: queue.Queue[tuple[DecodeRequest, bytes, Callable[[], None]]]
        self._writes = queue.Queue(MAX_WAITING)
        self._started = threading.Lock()

    def read(self, job_id: str) -> bytes | None:
        """The picture of a job, a PNG file; None if there is none, or the store has failed."""
        if time.monotonic() < self._paused_until:
            return None
        if self._paused_until:  # only this call tries the store again; others skip it meanwhile
            self._pause()
        try:
            png = self._readable.read(self._reference(job_id), self._limit)
        except ObjectNotFound:
            self._paused_until = 0.0
            return None
        except AfterimageError as e:
            self._pause()
            log.warning("job %s: its stored result cannot be read: %s", job_id, e)
            return None
        self._paused_until = 0.0
        if not png.startswith(signatures.PNG):
            log.warning("job %s: its stored result is no PNG file and is ignored", job_id)
            return None
        return png

    def write_later(self, decode: DecodeRequest, png: bytes, on_loss: Callable[[], None]) -> None:
        """Write the picture of a job in a thread. If that fails, log it and call `on_loss`."""
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._run, name="results", daemon=True).start()
        try:
            self._writes.put_nowait((decode, png, on_loss))
        except queue.Full:
            self._lost(decode, f"{MAX_WAITING} other pictures wait to be written", on_loss)

    def close(self) -> None:
        """Wait until all pictures are written, for at most `CLOSE_S`."""
        end = time.monotonic() + CLOSE_S
        while self._writes.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _run(self) -> None:
        while True:
            decode, png, on_loss = self._writes.get()
            try:
                self._write(decode, png)
            except AfterimageError as e:
                self._lost(decode, str(e), on_loss)
            except Exception:  # the thread must go on
                log.exception("job %s: its result cannot be written", decode.id)
                on_loss()
            self._writes.task_done()

    def _write(self, decode: DecodeRequest, png: bytes) -> None:
        if time.monotonic() < self._paused_until:
            raise StoreAway(f"the object store {self._folder.store!r} has just failed")
        try:
            about = metadata(decode, "png")
            self._objects.write(self._reference(decode.id), png, MEDIA_TYPES["png"], about)
        except StoreAway:
            self._pause()
            raise

    def _lost(self, decode: DecodeRequest, reason: str, on_loss: Callable[[], None]) -> None:
        log.warning("job %s: its result is only in the cache: %s", decode.id, reason)
        on_loss()

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE_S

    def _reference(self, job_id: str) -> Reference:
        return Reference(self._folder.store, f"{self._folder.key}/{job_id}.png")


def metadata(
    decode: DecodeRequest, format: OutputFormat, realism: float = 1.0
) -> Mapping[str, str]:
    """What is stored beside a picture: from what, and how, it was made."""
    return {
        **({} if realism == 1 else {"realism": str(realism)}),
        "decode": decode.id, "format": format, "bitstream": decode.digest, "tier": decode.tier,
        "seed": str(decode.seed), "codec": decode.codec, "decoder": decode.decoder,
    }  # fmt: skip


def connect(settings: WorkerSettings, objects: ObjectStores) -> Results | None:
    """The store of results of the settings; None without one.

    Raises `StoresError` unless the setting names a store that may be read and written.
    """
    if not settings.results:
        return None
    try:
        folder = Reference.parse(settings.results.rstrip("/"), "AFTERIMAGE_RESULTS")
    except AfterimageError as e:
        raise StoresError(str(e)) from None
    config = objects.configs.get(folder.store)
    if config is None or not (config.read and config.write):
        raise StoresError(
            f"AFTERIMAGE_RESULTS is {settings.results!r}: AFTERIMAGE_STORES must name the store "
            f"{folder.store!r}, with read = true and write = true"
        )
    return Results(objects, folder, settings.max_pixels)
