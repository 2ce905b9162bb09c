"""Drawing a batch of pictures: progress, previews, cancellation, and retries in smaller windows.

A window is the part of a picture that one call of the network computes (`models.tiles`).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import image
from models.codec import codec
from models.diffusion.decoder import WINDOW, Decoder, DiffusionInput
from models.errors import AfterimageError, Canceled, PictureError
from models.library import provenance
from worker.attempt import Attempt, LeaseLost
from worker.queue.records import DecodeRequest
from worker.queue.store import RedisError

log = logging.getLogger(__name__)

PREVIEW_INTERVAL_S = 1.0
"""Shortest time between two previews, each of which takes some hundredths of a second."""
POLL_PAUSE_S = 2.0
"""Pause of polling after an error of Redis, because each poll could wait for a timeout."""
MIN_WINDOW = WINDOW // 8
"""Smallest window that is tried when memory runs out, in latent positions."""


class OutOfMemory(AfterimageError):
    """Memory is insufficient even for the smallest windows; the process should exit."""


class DeviceLost(AfterimageError):
    """The CUDA device failed, and all further calls on it fail; the process should exit."""


@dataclass(slots=True)
class Drawing:
    """A batch of attempts at jobs of one shape and with the same settings."""

    attempts: Sequence[Attempt]
    dropped: dict[str, AfterimageError] = field(default_factory=dict)  # job id -> reason
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    _poll_again_at: float = 0.0  # on the clock of time.monotonic()
    _estimate: Callable[[], Tensor] | None = None  # returns the pictures as estimated so far
    _previewed_at: float = field(default_factory=time.monotonic)

    def draw(self, decoder: Decoder, inputs: Sequence[DiffusionInput]) -> Tensor:
        """Sample all pictures: (B, 3, H, W) in [0, 1], padded.

        If memory runs out, starts again with windows of half the area. Raises `OutOfMemory`,
        `DeviceLost`, and, once every job of the batch is dropped, `Canceled` or `LeaseLost`.
        """
        settings, window = self.attempts[0].state.decode.settings, WINDOW
        while True:
            try:
                return decoder.sample_batch(
                    inputs, settings, self._on_step, self._on_window, window
                )
            except Exception as e:
                if not is_out_of_memory(e):
                    if _is_device_lost(e):
                        raise DeviceLost(str(e).partition("\n")[0]) from e
                    raise
                log.warning("out of memory with windows of %d latent positions", window)
            window //= 2
            if window < MIN_WINDOW:
                raise OutOfMemory("out of memory even with the smallest windows")
            if decoder.device.type == "cuda":
                torch.cuda.empty_cache()

    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the pace so far; None before the first step."""
        total = self.attempts[0].state.total
        elapsed = time.monotonic() - self.began
        return elapsed / self.step * (total - self.step) if self.step else None

    def _on_step(self, step: int, steps: int, estimate: Callable[[], Tensor]) -> None:
        self.step, self._estimate = step, estimate
        watched = self._poll(step)
        since = time.monotonic() - self._previewed_at
        if watched and step < steps and since >= PREVIEW_INTERVAL_S:
            self._save_previews(watched)

    def _on_window(self) -> None:
        self._poll(None)

    def _poll(self, step: int | None) -> list[Attempt]:
        """Report progress, drop jobs without subscribers, and return those that clients watch.

        Once every job is dropped, raises the reason of the one that was dropped first.
        """
        watched: list[Attempt] = []
        if time.monotonic() < self._poll_again_at:
            return watched
        for attempt in self.attempts:
            if attempt.id in self.dropped:
                continue
            try:
                demand = attempt.poll(step)
                if demand.watched:
                    watched.append(attempt)
                if not demand.subscribed:
                    self._cancel(attempt)
            except LeaseLost as e:
                self.dropped[attempt.id] = e
            except RedisError:  # keep drawing, and poll again later
                self._poll_again_at = time.monotonic() + POLL_PAUSE_S
                return []
        if len(self.dropped) == len(self.attempts):
            raise next(iter(self.dropped.values()))
        return watched

    def _cancel(self, attempt: Attempt) -> None:
        """Drop a job without subscribers, unless it has new ones by now.

        The first attempt belongs to the job that RQ runs. It is only dropped here; its record is
        ended by a deferred action, after RQ has released the job.
        """
        self._save_previews([attempt])
        if attempt is self.attempts[0] or attempt.cancel(put_back=False):
            self.dropped[attempt.id] = Canceled("nobody waits for the picture any more")

    def _save_previews(self, attempts: Sequence[Attempt]) -> None:
        if self._estimate is None:
            return
        self._previewed_at = time.monotonic()
        pictures = self._estimate()
        for attempt in attempts:
            picture = pictures[self.attempts.index(attempt)][None]
            with contextlib.suppress(RedisError, PictureError):  # too large for WebP: no preview
                attempt.save_preview(self.step, encode(attempt.state.decode, picture, "webp"))


def encode(decode: DecodeRequest, x: Tensor, format: image.OutputFormat) -> bytes:
    """Crop `x` (1, 3, H, W) in [0, 1], padded; return a file with its provenance as metadata."""
    text = provenance(decode.tier, decode.settings, decode.seed, decode.codec, decode.decoder)
    pixels = codec.crop_to_pixels(x, decode.height, decode.width)
    return image.write(pixels, format, text)


def is_out_of_memory(e: Exception) -> bool:
    """True if `e` means that memory ran out, on the device or on the host.

    Libraries that torch calls report this by a plain `RuntimeError`.
    """
    if isinstance(e, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(e, RuntimeError) and any(text in str(e) for text in texts)


def _is_device_lost(e: Exception) -> bool:
    """True for a CUDA error, after which all calls fail until another process opens the device."""
    return isinstance(e, torch.AcceleratorError) or (
        isinstance(e, RuntimeError) and "CUDA error" in str(e)
    )
