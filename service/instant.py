"""Instant decodes, run in a thread pool with a bounded queue; recent pictures are cached."""

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from cachetools import LRUCache

from models import cancellation, geometry, image
from models.codec import architectures
from models.codec.bitstream import Bitstream
from models.image import OutputFormat
from models.library import Library
from service import metrics
from service.lines import USUAL, Kind, Line
from service.pixel_budget import PixelBudget
from service.settings import ServiceSettings
from service.waiter import NOBODY, Waiter

T = TypeVar("T")

MEGAPIXEL_S = 0.6
"""Seconds per megapixel of an instant decode on two cores: a guess until some have been decoded."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture file, and the milliseconds per decoding stage; no stages if it was cached."""

    data: bytes
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Shared:
    """A computation, and how many callers wait for it."""

    task: asyncio.Task[PictureFile]
    waiters: int = 0


class InstantDecoder:
    """Decodes bitstreams for requests, in threads, so that the event loop is not blocked.

    At most `decodes_at_once` calls run at a time and `waiting_line` more wait. Work ends when
    nobody waits for it any more.
    """

    def __init__(self, library: Library, settings: ServiceSettings, budget: PixelBudget) -> None:
        self.library = library
        self.settings = settings
        threads, waiting = settings.decodes_at_once, settings.waiting_line
        self._line = Line("decoder", threads, waiting, budget, MEGAPIXEL_S)
        self._shared: dict[Hashable, _Shared] = {}
        self._cache: LRUCache[Hashable, bytes]  # in this process, so that it works without Redis
        self._cache = LRUCache(settings.instant_cache_bytes, len)
        self.megapixel_s: dict[str, float] = {}
        """Moving averages of seconds per megapixel of an instant picture, by model."""

    async def picture(
        self, b: Bitstream, digest: str, format: OutputFormat, waiter: Waiter
    ) -> PictureFile:
        """Return the instant picture of `b`. Raises what `Codec.latents` and `once` raise."""
        key = digest, self.library.codec_id(b), format
        metrics.cache("draft", key in self._cache)
        requested_at = time.perf_counter()
        megapixels = geometry.megapixels(b.height, b.width)
        return await self.once(
            key, lambda: self._decode(b, format, requested_at), megapixels, waiter, kind(b)
        )

    async def once(
        self,
        key: Hashable,
        work: Callable[[], PictureFile],
        megapixels: float = 0.0,
        waiter: Waiter = NOBODY,
        kind: Kind = USUAL,
    ) -> PictureFile:
        """Return the cached result of `work` for `key`; concurrent callers share one computation.

        Raises what `run` and `work` raise. Callers that share a computation also share its timeout
        and its place in the line, which are those of the first. It is canceled with the last.
        """
        if (cached := self._cache.get(key)) is not None:
            return PictureFile(cached)
        if key not in self._shared:
            task = asyncio.create_task(self._compute(key, work, megapixels, waiter.caller, kind))
            # read the exception: asyncio would log it if all callers have disconnected
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._shared[key] = _Shared(task)
        shared = self._shared[key]
        shared.waiters += 1
        try:  # one caller must not cancel it for all
            return await waiter.wait_for(asyncio.shield(shared.task))
        finally:
            shared.waiters -= 1
            if not shared.waiters:
                shared.task.cancel()
                if self._shared.get(key) is shared:  # later callers begin anew
                    del self._shared[key]

    async def _compute(
        self,
        key: Hashable,
        work: Callable[[], PictureFile],
        megapixels: float,
        caller: str,
        kind: Kind,
    ) -> PictureFile:
        picture = await self._run(work, megapixels, caller, kind)
        if len(picture.data) < self._cache.maxsize / 4:
            self._cache[key] = picture.data
        return picture

    async def check(self, b: Bitstream, waiter: Waiter) -> None:
        """Entropy-decode `b` only to find errors. Raises what `Codec.latents` and `run` raise."""
        megapixels = geometry.megapixels(b.height, b.width)
        await self.run(lambda: self.library.codec(b).latents(b), megapixels, waiter, kind(b))

    async def run(
        self,
        work: Callable[[], T],
        megapixels: float = 0.0,
        waiter: Waiter = NOBODY,
        kind: Kind = USUAL,
    ) -> T:
        """Return the result of `work`, run in a thread of the pool.

        Raises `Busy` and, after `request_timeout_s`, `DeadlineExceeded` as `Line.run` does; what
        `work` raises; and `ClientDisconnect` if the waiter leaves.
        """
        return await waiter.wait_for(self._run(work, megapixels, waiter.caller, kind))

    async def _run(self, work: Callable[[], T], megapixels: float, caller: str, kind: Kind) -> T:
        limit = self.settings.request_timeout_s
        late = f"the picture was not ready within {limit:g} s; "
        seconds = self._line.seconds(megapixels, kind)
        if kind.name and seconds > limit / 2:  # half: the machine may be busy
            late += (
                f"{kind.name} takes about {seconds:.0f} s for its {megapixels:.1f} megapixels: "
                "send a smaller picture, or decode it with the command afterimage decode"
            )
        else:
            late += "try again later"
        return await self._line.run(lambda _: work(), limit, late, megapixels, caller, kind)

    def close(self) -> None:
        """Drop the calls that wait, and cancel those that run."""
        self._line.close()

    def _update_megapixel_s(self, ms: float, b: Bitstream) -> None:
        cost = ms / 1e3 / geometry.megapixels(b.height, b.width)
        before = self.megapixel_s.get(b.model, cost)
        self.megapixel_s[b.model] = before + 0.1 * (cost - before)

    def _decode(self, b: Bitstream, format: OutputFormat, requested_at: float) -> PictureFile:
        ends: dict[str, float] = {}

        def on_stage(stage: str) -> None:
            cancellation.check()
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


def kind(b: Bitstream) -> Kind:
    """Return the kind of work that decoding `b` is: each model takes its own time."""
    return Kind(b.model, architectures.find(b.model).effort)
