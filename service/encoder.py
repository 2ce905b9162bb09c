"""Encodes: photographs are read in child processes, and encoded in threads of their own."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from models import geometry
from models.codec import architectures, codec
from models.codec.bitstream import Bitstream, Format, Metric
from models.errors import PictureTooLarge, Unavailable
from models.image import Picture, Pixels
from models.library import Library
from models.pictures.process import Limits, PictureReaders, memory_limit
from service import metrics
from service.lines import SMALL, Deadline, Kind, Line
from service.pixel_budget import PixelBudget
from service.problems import DeadlineExceeded
from service.settings import ServiceSettings
from service.waiter import NOBODY, Waiter

MEGAPIXEL_S = 2.0
"""Seconds per megapixel of an encode: a guess until some have been encoded."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bitstream of a photograph. `notes` says what is wrong with its file."""

    bitstream: Bitstream
    notes: tuple[str, ...] = ()


class Encoder:
    """Encodes photographs within requests; instant decodes do not wait for it.

    At most `encodes_at_once` photographs are read and encoded at a time, since their pixels take
    memory; `waiting_line` more wait, as files.
    """

    def __init__(self, library: Library, settings: ServiceSettings, budget: PixelBudget) -> None:
        self.library = library
        self.settings = settings
        threads, waiting = settings.encodes_at_once, settings.waiting_line
        self._line = Line("encoder", threads, waiting, budget, MEGAPIXEL_S, False)
        self.readers = PictureReaders(memory_limit(settings.max_pixels))

    def start(self) -> None:
        """Start one reader, so that the first photograph does not wait for it."""
        with suppress(Unavailable):  # the first photograph tries again
            self.readers.start()

    def close(self) -> None:
        """Drop what waits and kill the readers, so that no thread waits for one."""
        self._line.close()
        self.readers.close()

    async def encode(
        self,
        data: bytes,
        quality: int,
        metric: Metric,
        format: Format,
        waiter: Waiter = NOBODY,
        model: str = architectures.DEFAULT,
    ) -> Encoded:
        """Encode a picture file; a truncated one as far as it goes, with a note.

        Waiting for a thread and reading may each take `request_timeout_s`, encoding that and
        `encode_megapixel_s` for each megapixel. Raises `Busy` if no thread becomes free,
        `DeadlineExceeded`, `ClientDisconnect` if the waiter leaves, and as `Library.find` and
        `PictureReaders.read`.
        """
        max_pixels = self.settings.max_pixels
        kind = Kind(model, architectures.find(model).effort)
        small_pixels = int(SMALL / kind.effort * 1e6)

        def work(deadline: Deadline, limit: int) -> Encoded:
            used = self.library.find(quality, metric, model=model)
            picture = self._read(data, deadline, limit)
            self._allow_for(picture.pixels, deadline)
            b = used.encode(codec.to_tensor(picture.pixels), format, "exact")
            return Encoded(b, picture.notes)

        def small(deadline: Deadline) -> Encoded | int:
            """Encode the picture, or return the number of its pixels if it is large."""
            try:
                return work(deadline, min(small_pixels, max_pixels))
            except PictureTooLarge as e:
                if e.pixels <= max_pixels and max_pixels > small_pixels:
                    return e.pixels or max_pixels
            return work(deadline, max_pixels)  # to say which limit it exceeds

        encoded = await self._run(small, small_pixels, waiter, kind)
        if isinstance(encoded, int):
            large = partial(work, limit=max_pixels)
            encoded = await self._run(large, encoded, waiter, kind)
        return encoded

    async def _run(
        self, work: Callable[[Deadline], T], pixels: int, waiter: Waiter, kind: Kind
    ) -> T:
        wait_s = self.settings.request_timeout_s
        late = f"other photographs are being encoded, for more than {wait_s:g} s; try again later"
        return await waiter.wait_for(
            self._line.run(work, wait_s, late, pixels / 1e6, waiter.caller, kind)
        )

    def _read(self, data: bytes, deadline: Deadline, max_pixels: int) -> Picture:
        settings = self.settings
        elapsed_s = settings.request_timeout_s
        late = f"the picture was not read within {elapsed_s:g} s; try again later"
        deadline.move(elapsed_s + 1, late)  # the reader's own limit comes first
        limits = Limits(max_pixels, settings.picture_cpu_s, elapsed_s)
        try:
            return self.readers.read(data, limits)
        except TimeoutError as e:  # the machine is busy: a limit of CPU time comes first otherwise
            metrics.shed("timeout")
            raise DeadlineExceeded(late) from e

    def _allow_for(self, pixels: Pixels, deadline: Deadline) -> None:
        """Move the deadline by the size of the picture, before it is encoded."""
        height, width = pixels.shape[:2]
        megapixels = geometry.megapixels(height, width)
        settings = self.settings
        seconds = settings.request_timeout_s + settings.encode_megapixel_s * megapixels
        late = (
            f"{width}×{height} pixels were not encoded within {seconds:.0f} s; "
            "try again later, or send a smaller picture"
        )
        deadline.move(seconds, late)
