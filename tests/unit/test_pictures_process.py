"""Picture files are read in child processes that are limited and replaced."""

import io
import os
import re
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import cancellation, image
from models.errors import Canceled, PictureError, PictureTooLarge, Unavailable, UnsupportedPicture
from models.pictures import process
from models.pictures.process import Limits, PictureReaders, memory_limit
from tests.support import hostile
from tests.support.pictures import chunk

LIMITS = Limits(max_pixels=1_000_000, cpu_s=5, elapsed_s=60)
SLOW = Limits(max_pixels=10**7, cpu_s=60, elapsed_s=60)


def png(width: int = 64, height: int = 48) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return image.write(noise, "png")


@pytest.fixture
def readers() -> Iterator[PictureReaders]:
    made = PictureReaders(memory_limit(10**7))
    yield made
    made.close()


def only(readers: PictureReaders) -> int:
    """Process id of the only reader, which is idle."""
    (reader,) = readers._idle
    return reader.process.pid


def wait_until_busy(readers: PictureReaders) -> int:
    """Wait until a file is being read; return the reader's process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for reader in list(readers._busy):
            return reader.process.pid
        time.sleep(0.01)
    pytest.fail("no reader began")


def test_a_reader_returns_what_reading_in_the_process_returns(readers: PictureReaders) -> None:
    picture = readers.read(png(), LIMITS)
    assert np.array_equal(picture.pixels, image.read(png(), 10**6))
    assert picture.pixels.flags.writeable
    assert picture.notes == ()


def test_a_reader_returns_the_notes_on_a_truncated_file(readers: PictureReaders) -> None:
    data = png()[:-3000]
    picture, expected = readers.read(data, LIMITS), image.read_with_notes(data, 10**6)
    assert picture.notes == expected.notes != ()
    assert np.array_equal(picture.pixels, expected.pixels)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", PictureError, "empty"),
        (b"nothing", UnsupportedPicture, "PNG"),
        (png(1100, 1000), PictureTooLarge, "1100×1000"),
        (png()[:60], PictureError, "truncated"),
    ],
)
def test_errors_keep_their_class_and_text(
    readers: PictureReaders, data: bytes, error: type[Exception], text: str
) -> None:
    readers.start()
    pid = only(readers)
    with pytest.raises(error, match=text):
        readers.read(data, LIMITS)
    assert only(readers) == pid  # it reads the next file too


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_file_that_takes_too_much_cpu_time_ends_its_reader_alone(
    readers: PictureReaders, name: str
) -> None:
    with pytest.raises(PictureError, match=r"more than 0.3 s of CPU time.*save it anew"):
        readers.read(hostile.FILES[name](), Limits(10**7, cpu_s=0.3, elapsed_s=60))
    assert readers._idle == []
    assert readers.read(png(), LIMITS).pixels.shape == (48, 64, 3)


def test_a_file_that_takes_too_long_ends_its_reader_alone(readers: PictureReaders) -> None:
    with pytest.raises(TimeoutError, match="within 0.5 s"):
        readers.read(hostile.comments(), Limits(10**6, cpu_s=60, elapsed_s=0.5))
    assert readers._idle == []
    assert readers.read(png(), LIMITS).pixels.shape == (48, 64, 3)


def test_a_file_that_takes_too_much_memory_ends_its_reader_alone() -> None:
    readers = PictureReaders(2**29)
    out = io.BytesIO()
    Image.new("RGB", (9_000, 9_000)).save(out, "PNG")
    with pytest.raises(PictureError, match=r"more than 0.5 GiB of memory"):
        readers.read(out.getvalue(), Limits(400_000_000, 60, 120))
    assert readers.read(png(), LIMITS).pixels.shape == (48, 64, 3)
    readers.close()


def profile(size: int, tags: int) -> bytes:
    """An ICC profile that declares 4 GiB and so many tags of 4 GiB, in `size` bytes of zeros."""
    head = struct.pack(">I4sI4s4s4s", 2**32 - 1, b"lcms", 0x04400000, b"mntr", b"RGB ", b"XYZ ")
    head = (head.ljust(36, b"\0") + b"acsp").ljust(128, b"\0") + struct.pack(">I", tags)
    table = struct.pack(">4sII", b"A2B0", 132, 2**32 - 1) * min(tags, 1000)
    return (head + table).ljust(size, b"\0")


def with_profile(format: str, icc: bytes) -> bytes:
    out = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.new("RGB", (8, 8), (40, 160, 80)).save(out, format, icc_profile=icc, **options)
    return out.getvalue()


def png_bomb(name: bytes, before: bytes, megabytes: int) -> bytes:
    """A PNG with a chunk that unpacks to so many megabytes."""
    packer = zlib.compressobj(1)
    packed = packer.compress(profile(10**6, 2**32 - 1))
    packed += b"".join(packer.compress(bytes(10**6)) for _ in range(megabytes)) + packer.flush()
    data = image.write(np.full((8, 8, 3), (40, 160, 80), np.uint8), "png")
    return data[:33] + chunk(name, before + packed) + data[33:]


BOMBS = {
    "PNG, 300 MB unpacked": lambda: png_bomb(b"iCCP", b"wide\0\0", 300),
    "PNG, 30 MB unpacked": lambda: png_bomb(b"iCCP", b"wide\0\0", 30),
    "PNG, a text of 300 MB": lambda: png_bomb(b"zTXt", b"text\0\0", 300),
    "PNG, a text of 300 MB in UTF-8": lambda: png_bomb(b"iTXt", b"text\0\1\0\0\0", 300),
    "JPEG, 255 segments": lambda: with_profile("JPEG", profile(255 * 65519, 2**32 - 1)),
    "JPEG, many tags": lambda: with_profile("JPEG", profile(20_000, 100)),
    "WebP, 16 MB": lambda: with_profile("WEBP", profile(16 * 2**20, 2**32 - 1)),
    "TIFF, 16 MB": lambda: with_profile("TIFF", profile(16 * 2**20, 2**32 - 1)),
    "AVIF, 16 MB": lambda: with_profile("AVIF", profile(16 * 2**20, 2**32 - 1)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_profile_that_lies_about_its_size_is_ignored_in_little_time_and_memory(
    readers: PictureReaders, name: str
) -> None:
    picture = readers.read(BOMBS[name](), Limits(10**6, cpu_s=3, elapsed_s=60))
    assert np.abs(picture.pixels[0, 0].astype(int) - (40, 160, 80)).max() <= 3
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{only(readers)}/status").read_text())
    assert peak and int(peak[1]) * 1024 < 300 * 10**6


def test_a_reader_that_was_killed_while_it_was_idle_is_replaced(readers: PictureReaders) -> None:
    readers.start()
    killed = only(readers)
    os.kill(killed, signal.SIGKILL)
    assert readers.read(png(), LIMITS).pixels.shape == (48, 64, 3)
    assert only(readers) != killed


def test_a_file_whose_reader_was_killed_from_outside_is_read_again_once(
    readers: PictureReaders,
) -> None:
    with ThreadPoolExecutor() as pool:
        for kills in (1, 2):
            reading = pool.submit(readers.read, hostile.comments(0.3), SLOW)
            killed: set[int] = set()
            while len(killed) < kills:
                pid = wait_until_busy(readers)
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            if kills == 1:
                assert reading.result(60).pixels.shape == (1, 1, 3)
            else:
                with pytest.raises(Unavailable, match="ended twice.*try again"):
                    reading.result(60)


def test_a_file_that_crashes_two_readers_is_refused(
    readers: PictureReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = process._start

    def crashing(memory_bytes: int) -> process._Reader:
        reader = start(memory_bytes)
        os.kill(reader.process.pid, signal.SIGSEGV)
        return reader

    monkeypatch.setattr(process, "_start", crashing)
    with pytest.raises(PictureError, match=r"crashes.*SIGSEGV.*save it anew"):
        readers.read(png(), LIMITS)


def test_a_reader_that_cannot_be_started_is_not_the_pictures_fault(
    readers: PictureReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(Unavailable, match="no process can be started"):
        readers.read(png(), LIMITS)


@pytest.mark.parametrize(
    "reply",
    [b"no JSON", b"[]", b'{"height": 1}', b'{"height": 5000, "width": 5000}', b'{"error": 1}'],
)
def test_a_reader_that_a_file_took_over_cannot_harm_the_service(
    readers: PictureReaders, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    def taken_over(_: int) -> process._Reader:
        reader = process._start(memory_limit(10**6))
        monkeypatch.setattr(type(reader.connection), "recv_bytes", lambda *_: reply)
        return reader

    monkeypatch.setattr(PictureReaders, "_take", lambda self: taken_over(0))
    with pytest.raises(Unavailable):
        readers.read(png(), LIMITS)


def test_several_files_are_read_at_a_time(readers: PictureReaders) -> None:
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(readers.read, hostile.comments(), Limits(10**7, 60, 60))
        pid = wait_until_busy(readers)
        assert readers.read(png(), LIMITS).pixels.shape == (48, 64, 3)
        assert not slow.done()
        os.kill(pid, signal.SIGKILL)
        readers.close()
        with pytest.raises(Unavailable):
            slow.result(30)


def test_closing_ends_what_is_being_read(readers: PictureReaders) -> None:
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(Unavailable, match="stopping"):
            readers.read(hostile.comments(), SLOW)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    pid = wait_until_busy(readers)
    readers.close()
    assert ended.wait(10)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(Unavailable, match="stopping"):
        readers.read(png(), LIMITS)


def test_a_reader_is_killed_when_nobody_waits_for_its_picture(readers: PictureReaders) -> None:
    canceled = threading.Event()

    def read() -> None:
        with cancellation.cancelable(canceled):
            readers.read(hostile.comments(), SLOW)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        wait_until_busy(readers)
        canceled.set()
        with pytest.raises(Canceled):
            reading.result(10)
    assert (readers._busy, readers._idle) == (set(), [])


def test_the_size_of_a_picture_beyond_the_limit_is_passed_on(readers: PictureReaders) -> None:
    with pytest.raises(PictureTooLarge) as e:
        readers.read(png(), Limits(100, 10, 60))
    assert e.value.pixels == 48 * 64
