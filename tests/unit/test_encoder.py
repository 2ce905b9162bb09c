"""Encodes: a line of their own, a deadline by size, readers that hostile files cannot keep."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models import image
from models.codec.bitstream import Bitstream
from models.errors import PictureError
from models.image import Picture
from models.pictures.process import Limits
from service.encoder import Encoded, Encoder
from service.pixel_budget import PixelBudget
from service.problems import Busy, DeadlineExceeded
from service.settings import ServiceSettings
from tests.support import hostile
from tests.support.waiting import until

DONE = Bitstream("msh", "exact", 2, "mse", 1000, 1000, b"", b"")


class SlowLibrary:
    """A library whose only codec takes `seconds` for any picture."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds

    def find(self, *_: object, model: str = "") -> "SlowLibrary":
        return self

    def encode(self, *_: object) -> Bitstream:
        time.sleep(self.seconds)
        return DONE


@pytest.fixture
def made() -> Iterator[list[Encoder]]:
    """Encoders that are closed after the test."""
    encoders: list[Encoder] = []
    yield encoders
    for encoder in encoders:
        encoder.close()


def encoder(made: list[Encoder], seconds: float = 0, **settings: Any) -> Encoder:
    made.append(Encoder(SlowLibrary(seconds), ServiceSettings(**settings), PixelBudget(40)))  # type: ignore[arg-type]
    return made[-1]


def read_at_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the readers return a megapixel at once."""
    picture = Picture(np.zeros((1000, 1000, 3), np.uint8))
    monkeypatch.setattr(encoder.readers, "read", lambda *_: picture)


def encode(encoder: Encoder, data: bytes = b"") -> Any:
    return encoder.encode(data, 2, "mse", "msh")


def test_the_deadline_of_an_encode_grows_with_the_picture(
    made: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = encoder(made, 1.0, request_timeout_s=0.2, encode_megapixel_s=30)
    hasty = encoder(made, 1.0, request_timeout_s=0.2, encode_megapixel_s=0.1)
    for each in (patient, hasty):
        read_at_once(each, monkeypatch)
    assert asyncio.run(encode(patient)) == Encoded(DONE)
    with pytest.raises(DeadlineExceeded, match="1000×1000 pixels.*0 s; try again later, or send"):
        asyncio.run(encode(hasty))


def test_the_largest_picture_may_take_what_it_was_seen_to_take() -> None:
    """12 to 20 megapixels took up to 38 s of CPU time, on machines with twice as much to do."""
    settings = ServiceSettings()
    seconds = settings.request_timeout_s + settings.encode_megapixel_s * settings.max_pixels / 1e6
    assert seconds >= 2 * 38


def test_waiting_for_a_thread_is_bounded(
    made: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = encoder(made, 1.0, request_timeout_s=0.3, encodes_at_once=1, waiting_line=1)
    read_at_once(one, monkeypatch)

    async def scenario() -> None:
        first = asyncio.create_task(encode(one))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(encode(one))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="already wait") as full:
            await encode(one)
        with pytest.raises(Busy, match="other photographs") as late:
            await second
        assert all(int(e.value.headers["Retry-After"]) > 0 for e in (full, late))
        assert await first == Encoded(DONE)

    asyncio.run(scenario())


def test_a_reader_is_killed_at_the_deadline_of_its_request(made: list[Encoder]) -> None:
    one = encoder(made, request_timeout_s=2, picture_cpu_s=60, encodes_at_once=1)
    one.start()
    with pytest.raises(DeadlineExceeded, match="not read within 2 s"):
        asyncio.run(encode(one, hostile.comments()))
    assert (one.readers._busy, one.readers._idle) == (set(), [])


def test_a_request_that_is_cancelled_leaves_no_reader_behind(made: list[Encoder]) -> None:
    one = encoder(made, picture_cpu_s=300)

    async def scenario() -> None:
        task = asyncio.create_task(encode(one, hostile.comments()))
        await asyncio.to_thread(until, lambda: one.readers._busy, "the reader is busy")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, lambda: not one.readers._busy, "the reader has ended")

    asyncio.run(scenario())
    assert one.readers._idle == []


def test_a_service_that_stops_waits_for_no_reader(made: list[Encoder]) -> None:
    one = encoder(made, picture_cpu_s=300, encodes_at_once=1)

    def close() -> None:
        until(lambda: one.readers._busy, "the reader is busy")
        one.close()

    threading.Thread(target=close).start()
    began = time.monotonic()
    with pytest.raises(Exception, match="stopping"):
        asyncio.run(encode(one, hostile.comments()))
    assert time.monotonic() - began < 30


def test_a_limit_is_told_as_the_pictures_fault(made: list[Encoder]) -> None:
    one = encoder(made, picture_cpu_s=0.3)
    with pytest.raises(PictureError, match="more than 0.3 s of CPU time"):
        asyncio.run(encode(one, hostile.comments()))
    small = image.write(np.zeros((8, 8, 3), np.uint8), "png")
    assert one.readers.read(small, Limits(100, 5, 60)).pixels.shape == (8, 8, 3)
