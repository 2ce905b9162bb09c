"""One picture or several of one shape while they are drawn: who still wants them, previews."""

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
from worker.queue.records import Decode
from worker.queue.store import RedisError

log = logging.getLogger(__name__)

PREVIEW_S = 1.0
"""At least so long from one preview to the next: drawing one takes some hundredths of a second."""
BLIND_S = 2.0
"""How long nobody is asked what is wanted after Redis was away: each time would wait for it."""
SMALLEST = WINDOW // 8
"""Latent positions below which a picture is not cut finer: there is no memory for anything."""


class OutOfMemory(AfterimageError):
    """Not even the smallest tiles fit into memory: the process should end."""


class DeviceLost(AfterimageError):
    """The device fails, whatever is asked of it: the process should end."""


@dataclass(slots=True)
class Drawing:
    """Attempts at jobs of one shape and one setting."""

    attempts: Sequence[Attempt]
    dropped: dict[str, AfterimageError] = field(default_factory=dict)  # job -> why nobody waits
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    _blind_until: float = 0.0  # of time.monotonic()
    _picture: Callable[[], Tensor] | None = None  # the estimate so far
    _previewed: float = field(default_factory=time.monotonic)

    def draw(self, decoder: Decoder, drafts: Sequence[DiffusionInput]) -> Tensor:
        """(B, 3, H, W) in [0, 1], padded; where memory is short, in smaller and smaller tiles.

        Raises `Canceled` or `LeaseLost` where nobody waits any more for any of them, `OutOfMemory`,
        `DeviceLost`.
        """
        settings, window = self.attempts[0].state.decode.settings, WINDOW
        while True:
            try:
                return decoder.sample_batch(drafts, settings, self._on_step, self._on_tile, window)
            except Exception as e:
                if not short_of_memory(e):
                    if _sticky(e):
                        raise DeviceLost(str(e).partition("\n")[0]) from e
                    raise
                log.warning("out of memory with tiles of %d latent positions", window)
            window //= 2
            if window < SMALLEST:
                raise OutOfMemory("there is no memory for the smallest tiles")
            if decoder.device.type == "cuda":
                torch.cuda.empty_cache()

    def left_s(self) -> float | None:
        """Seconds until the end, by the steps that are done; None before the first."""
        total = self.attempts[0].state.total
        done = time.monotonic() - self.began
        return done / self.step * (total - self.step) if self.step else None

    def _on_step(self, step: int, steps: int, picture: Callable[[], Tensor]) -> None:
        self.step, self._picture = step, picture
        watched = self._look(step)
        if watched and step < steps and time.monotonic() - self._previewed >= PREVIEW_S:
            self._preview(watched)

    def _on_tile(self) -> None:
        self._look(None)

    def _look(self, step: int | None) -> list[Attempt]:
        """Those whose previews are looked at; raises once there is nobody left to draw for."""
        watched: list[Attempt] = []
        if time.monotonic() < self._blind_until:
            return watched
        for attempt in self.attempts:
            if attempt.id in self.dropped:
                continue
            try:
                wish = attempt.look(step)
                if wish.watched:
                    watched.append(attempt)
                if not wish.wanted:
                    self._drop(attempt)
            except LeaseLost as e:
                self.dropped[attempt.id] = e
            except RedisError:  # to know what is wanted is worth less than the work
                self._blind_until = time.monotonic() + BLIND_S
                return []
        if len(self.dropped) == len(self.attempts):
            raise next(iter(self.dropped.values()))
        return watched

    def _drop(self, attempt: Attempt) -> None:
        """Nobody waits: the end, unless somebody came; of RQ's own job when RQ is done with it."""
        self._preview([attempt])  # the best so far is kept
        if attempt is self.attempts[0] or attempt.stop(back=False):
            self.dropped[attempt.id] = Canceled("nobody waits for the picture any more")

    def _preview(self, attempts: Sequence[Attempt]) -> None:
        if self._picture is None:
            return
        self._previewed = time.monotonic()
        pictures = self._picture()
        for attempt in attempts:
            row = pictures[self.attempts.index(attempt)][None]
            with contextlib.suppress(RedisError, PictureError):  # no WebP file is that large
                attempt.preview(self.step, file(attempt.state.decode, row, "webp"))


def file(d: Decode, x: Tensor, format: image.OutputFormat) -> bytes:
    """The file of what was drawn, `x` (1, 3, H, W) with its padding, which says what it is."""
    text = provenance(d.tier, d.settings, d.seed, d.codec, d.decoder)
    return image.write(codec.crop_to_pixels(x, d.height, d.width), format, text)


def short_of_memory(e: Exception) -> bool:
    """Of a device, or of the host; libraries below torch tell it as a plain `RuntimeError`."""
    told = any(words in str(e) for words in ("can't allocate memory", "STATUS_ALLOC_FAILED"))
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(e, kinds) or (isinstance(e, RuntimeError) and told)


def _sticky(e: Exception) -> bool:
    """After such an error every call on the device fails, until another process opens it."""
    return isinstance(e, torch.AcceleratorError) or (
        isinstance(e, RuntimeError) and "CUDA error" in str(e)
    )
