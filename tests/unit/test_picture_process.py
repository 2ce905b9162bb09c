"""Picture files are read in child processes that are limited and replaced."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from models import image
from models.errors import PictureError, PictureTooLarge, UnsupportedPicture
from models.picture_process import Limits, PictureReaders, PictureTooExpensive

LIMITS = Limits(max_pixels=1_000_000, cpu_s=5, elapsed_s=30)


def png(width: int = 64, height: int = 48) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def slow(megabytes: int = 4) -> bytes:
    """A PPM that is made of comment lines: Pillow takes many seconds a megabyte."""
    return b"P6\n" + b"#\n" * (megabytes * 2**19) + b"1 1 255\nabc"


@pytest.fixture
def readers() -> Iterator[PictureReaders]:
    made = PictureReaders(1)
    yield made
    made.close()


def test_a_reader_returns_what_reading_in_the_process_returns(readers: PictureReaders) -> None:
    assert np.array_equal(readers.read(png(), LIMITS), image.read(png(), 10**6))


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", PictureError, "empty"),
        (b"nothing", UnsupportedPicture, "PNG"),
        (png(1100, 1000), PictureTooLarge, "1100×1000"),
        (png()[:-100], PictureError, "truncated"),
    ],
)
def test_errors_keep_their_class_and_text(
    readers: PictureReaders, data: bytes, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        readers.read(data, LIMITS)


def test_a_file_that_takes_too_much_cpu_time_ends_its_reader_alone(
    readers: PictureReaders,
) -> None:
    began = time.monotonic()
    with pytest.raises(PictureTooExpensive, match="more than 1 s of CPU time"):
        readers.read(slow(), Limits(10**6, cpu_s=1, elapsed_s=60))
    assert time.monotonic() - began < 30
    assert readers.read(png(), LIMITS).shape == (48, 64, 3)


def test_a_file_that_takes_too_long_ends_its_reader_alone(readers: PictureReaders) -> None:
    with pytest.raises(PictureTooExpensive, match="longer than 0.5 s"):
        readers.read(slow(), Limits(10**6, cpu_s=60, elapsed_s=0.5))
    assert readers.read(png(), LIMITS).shape == (48, 64, 3)


def test_a_file_that_takes_too_much_memory_ends_its_reader_alone() -> None:
    readers = PictureReaders(1, memory_bytes=2**29)
    large = Limits(400_000_000, 60, 120)
    out = io.BytesIO()
    Image.new("RGB", (13_000, 13_000)).save(out, "PNG")
    with pytest.raises(PictureError):
        readers.read(out.getvalue(), large)
    assert readers.read(png(), LIMITS).shape == (48, 64, 3)
    readers.close()


def test_a_reader_that_was_killed_is_replaced(readers: PictureReaders) -> None:
    readers.start()
    reader = readers._idle.queue[0]
    assert reader is not None
    os.kill(reader.process.pid, signal.SIGKILL)
    reader.process.wait()
    with pytest.raises(PictureTooExpensive):
        readers.read(png(), LIMITS)
    assert readers.read(png(), LIMITS).shape == (48, 64, 3)


def test_closing_ends_what_is_being_read(readers: PictureReaders) -> None:
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(PictureError):
            readers.read(slow(), Limits(10**6, 60, 60))
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    time.sleep(1.5)
    readers.close()
    assert ended.wait(10)
    with pytest.raises(PictureError, match="stopping"):
        readers.read(png(), LIMITS)
