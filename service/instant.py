"""Instant decodes, run in a thread pool with a bounded queue; recent pictures are cached."""

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from cachetools import LRUCache

from models import geometry, image
from models.codec.bitstream import Bitstream
from models.image import OutputFormat
from models.library import Library
from service import metrics
from service.lines import Line
from service.settings import ServiceSettings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture file, and the milliseconds per decoding stage; no stages if it was cached."""

    data: bytes
    stages_ms: dict[str, float] = field(default_factory=dict)


class InstantDecoder:
    """Decodes bitstreams for requests, in threads, so that the event loop is not blocked.

    At most `decodes_at_once` calls run at a time and `waiting_line` more wait.
    """

    def __init__(self, library: Library, settings: ServiceSettings) -> None:
        self.library = library
        self.settings = settings
        self._line = Line("decoder", settings.decodes_at_once, settings.waiting_line, mean_s=0.3)
        self._tasks: dict[Hashable, asyncio.Task[PictureFile]] = {}
        self._cache: LRUCache[Hashable, bytes]  # in this process, so that it works without Redis
        self._cache = LRUCache(settings.instant_cache_bytes, len)
        self.megapixel_s: float | None = None
        """Moving average of seconds per megapixel of an instant picture; None before the first."""

    async def picture(self, b: Bitstream, digest: str, format: OutputFormat) -> PictureFile:
        """Return the instant picture of `b`. Raises what `Codec.latents` and `run` raise."""
        key = digest, self.library.codec_id(b), format
        metrics.cache("draft", key in self._cache)
        requested_at = time.perf_counter()
        return await self.once(key, lambda: self._decode(b, format, requested_at))

    async def once(self, key: Hashable, work: Callable[[], PictureFile]) -> PictureFile:
        """Return the cached result of `work` for `key`; concurrent callers share one computation.

        Raises what `run` and `work` raise. Callers that share a computation also share its timeout,
        which starts with the first of them.
        """
        if (cached := self._cache.get(key)) is not None:
            return PictureFile(cached)
        if key not in self._tasks:
            self._tasks[key] = task = asyncio.create_task(self._compute(key, work))
            # read the exception: asyncio would log it if all callers have disconnected
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._tasks[key])  # one caller must not cancel it for all

    async def _compute(self, key: Hashable, work: Callable[[], PictureFile]) -> PictureFile:
        try:
            picture = await self.run(work)
        finally:
            del self._tasks[key]
        if len(picture.data) < self._cache.maxsize / 4:
            self._cache[key] = picture.data
        return picture

    async def check(self, b: Bitstream) -> None:
        """Entropy-decode `b` only to find errors. Raises what `Codec.latents` and `run` raise."""
        await self.run(lambda: self.library.codec(b).latents(b))

    async def run(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, run in a thread of the pool.

        Raises `Busy` if `waiting_line` calls wait already, `DeadlineExceeded` after
        `request_timeout_s`, and what `work` raises. After the timeout, work that has started still
        occupies its thread until it returns.
        """
        limit = self.settings.request_timeout_s
        late = f"the picture was not ready within {limit:g} s; try again later"
        return await self._line.run(lambda _: work(), limit, late)

    def close(self) -> None:
        """Drop the calls that wait."""
        self._line.close()

    def _update_megapixel_s(self, ms: float, b: Bitstream) -> None:
        cost = ms / 1e3 / geometry.megapixels(b.height, b.width)
        before = cost if self.megapixel_s is None else self.megapixel_s
        self.megapixel_s = before + 0.1 * (cost - before)

    def _decode(self, b: Bitstream, format: OutputFormat, requested_at: float) -> PictureFile:
        ends: dict[str, float] = {}

        def on_stage(stage: str) -> None:
            ends[stage] = time.perf_counter()

        on_stage("queue")
        pixels = self.library.codec(b).decode(b, on_stage)
        data = image.write(pixels, format)
        on_stage("encode")
        starts = (requested_at, *ends.values())
        spans = zip(ends.items(), starts, strict=False)
        stages_ms = {name: (end - start) * 1e3 for (name, end), start in spans}
        metrics.stages(stages_ms)
        self._update_megapixel_s(sum(ms for name, ms in stages_ms.items() if name != "queue"), b)
        return PictureFile(data, stages_ms)
