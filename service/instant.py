"""Instant pictures: computed off the event loop, with a bounded line of those who wait."""

import asyncio
import contextvars
import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from cachetools import LRUCache

from models import geometry, image
from models.codec.bitstream import Bitstream
from models.image import OutputFormat
from models.library import Library
from service import metrics
from service.problems import Busy, DeadlineExceeded
from service.settings import ServiceSettings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture file, and the ms that its stages took; none where it was kept."""

    file: bytes
    stages: dict[str, float] = field(default_factory=dict)


class Instant:
    """What of a process computes pictures within requests."""

    def __init__(self, library: Library, settings: ServiceSettings) -> None:
        self.library = library
        self.settings = settings
        self._threads = ThreadPoolExecutor(settings.decodes_at_once, "instant")
        self._asked = 0  # turns that requests wait for or have
        self._drawing: dict[Hashable, asyncio.Task[Drawn]] = {}
        self._kept: LRUCache[Hashable, bytes]  # repeats are quick, Redis or no
        self._kept = LRUCache(settings.instant_cache_bytes, len)
        self._seconds = 0.3  # of a turn, lately
        self.megapixel_s: float | None = None
        """Seconds of an instant picture per megapixel, lately; None before the first."""

    async def picture(self, b: Bitstream, digest: str, format: OutputFormat) -> Drawn:
        """The instant picture of a bitstream. Raises as `Codec.latents` and `run`."""
        name = digest, self.library.codec_id(b), format
        metrics.cache("draft", name in self._kept)
        asked = time.perf_counter()
        return await self.once(name, lambda: self._draw(b, format, asked))

    async def once(self, name: Hashable, work: Callable[[], Drawn]) -> Drawn:
        """What `work` draws, kept under `name`; who asks meanwhile waits for the same, no longer
        than the first. Raises as `run`."""
        if (kept := self._kept.get(name)) is not None:
            return Drawn(kept)
        if name not in self._drawing:
            self._drawing[name] = task = asyncio.create_task(self._make(name, work))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # was seen
        return await asyncio.shield(self._drawing[name])  # others wait where one leaves

    async def _make(self, name: Hashable, work: Callable[[], Drawn]) -> Drawn:
        try:
            drawn = await self.run(work)
        finally:
            del self._drawing[name]
        if len(drawn.file) < self._kept.maxsize / 4:
            self._kept[name] = drawn.file
        return drawn

    async def check(self, b: Bitstream) -> None:
        """Raise what decoding the bitstream would raise; no picture is made."""
        await self.run(lambda: self.library.codec(b).latents(b))

    async def run(self, work: Callable[[], T]) -> T:
        """`work` in a thread, when its turn comes.

        Raises `Busy` where the line is full, `DeadlineExceeded` where it takes too long; a turn
        that had begun keeps its thread until it is done, whoever has gone.
        """
        waiting = max(self._asked - self.settings.decodes_at_once, 0)
        if waiting >= self.settings.waiting_line:
            turns = (waiting + 1) / self.settings.decodes_at_once
            retry_after = str(math.ceil(turns * self._seconds))
            metrics.shed("line")
            raise Busy(f"{waiting} requests wait already", {"Retry-After": retry_after})
        turn = self._threads.submit(contextvars.copy_context().run, self._timed, work)
        self._asked += 1
        try:
            with anyio.fail_after(self.settings.request_timeout_s):
                return await asyncio.wrap_future(turn)
        except TimeoutError as e:
            limit = self.settings.request_timeout_s
            metrics.shed("timeout")
            raise DeadlineExceeded(f"no answer within {limit:g} s") from e
        finally:
            self._asked -= 1

    def _learn(self, ms: float, b: Bitstream) -> None:
        cost = ms / 1e3 / geometry.megapixels(b.height, b.width)
        before = cost if self.megapixel_s is None else self.megapixel_s
        self.megapixel_s = before + 0.1 * (cost - before)

    def _timed(self, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._seconds += 0.1 * (time.perf_counter() - began - self._seconds)

    def _draw(self, b: Bitstream, format: OutputFormat, asked: float) -> Drawn:
        ends: dict[str, float] = {}

        def on_stage(stage: str) -> None:
            ends[stage] = time.perf_counter()

        on_stage("queue")
        pixels = self.library.codec(b).decode(b, on_stage)
        file = image.write(pixels, format)
        on_stage("encode")
        began = (asked, *ends.values())
        spans = zip(ends.items(), began, strict=False)
        stages = {name: (end - start) * 1e3 for (name, end), start in spans}
        metrics.stages(stages)
        self._learn(sum(ms for name, ms in stages.items() if name != "queue"), b)
        return Drawn(file, stages)
