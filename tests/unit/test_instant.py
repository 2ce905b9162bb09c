"""The thread pool of instant decodes: bounded threads, bounded waiting line, shared results."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import torch

from models import cancellation
from models.codec import zoo
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec
from models.errors import Canceled
from models.library import Library
from service.instant import InstantDecoder, PictureFile
from service.pixel_budget import PixelBudget
from service.problems import Busy, DeadlineExceeded
from service.settings import ServiceSettings
from service.waiter import NOBODY
from tests.support import zoo as nets


def instant(**settings: float) -> InstantDecoder:
    return InstantDecoder(Library({}), ServiceSettings(**settings), PixelBudget(40))  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_work_keeps_its_thread_after_its_request_timed_out() -> None:
    decoder = instant(decodes_at_once=1, request_timeout_s=0.2)
    go, running = threading.Event(), []

    def work() -> None:
        running.append(1)
        go.wait(10)

    async def scenario() -> None:
        with pytest.raises(DeadlineExceeded):
            await decoder.run(work)
        with pytest.raises(Busy, match="try again later") as late:
            await decoder.run(work)  # the first still runs
        assert int(late.value.headers["Retry-After"]) >= 1
        assert len(running) == 1
        go.set()
        assert await decoder.run(lambda: 7) == 7
        assert len(running) == 1  # work that timed out while waiting never starts

    asyncio.run(scenario())


def test_concurrent_requests_for_one_picture_share_a_computation() -> None:
    decoder = instant(decodes_at_once=2)
    go, started = threading.Event(), []

    def work() -> PictureFile:
        started.append(1)
        go.wait(10)
        return PictureFile(b"file")

    async def scenario() -> None:
        many = [asyncio.create_task(decoder.once("a", work)) for _ in range(100)]
        await asyncio.sleep(0.05)
        many.pop(0).cancel()  # the first caller leaves
        go.set()
        assert {picture.data for picture in await asyncio.gather(*many)} == {b"file"}
        assert (await decoder.once("a", work)).data == b"file"
        assert len(started) == 1

    asyncio.run(scenario())


def test_a_failed_computation_is_repeated() -> None:
    decoder = instant()

    def fail() -> PictureFile:
        raise ValueError("broken")

    async def scenario() -> None:
        both = await asyncio.gather(
            *(decoder.once("a", fail) for _ in range(2)), return_exceptions=True
        )
        assert [str(e) for e in both] == ["broken"] * 2
        assert (await decoder.once("a", lambda: PictureFile(b"file"))).data == b"file"

    asyncio.run(scenario())


def test_the_waiting_line_is_bounded() -> None:
    decoder = instant(decodes_at_once=1, waiting_line=2)
    go = threading.Event()

    async def scenario() -> None:
        waiting = [asyncio.create_task(decoder.run(lambda: go.wait(10))) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await decoder.run(lambda: None)
        go.set()
        assert await asyncio.gather(*waiting) == [True] * 3

    asyncio.run(scenario())


def test_work_is_canceled_with_the_last_of_its_callers() -> None:
    decoder = instant(decodes_at_once=1)
    begun, ended = [], []

    def work() -> PictureFile:
        begun.append(1)
        try:
            while True:
                time.sleep(0.005)
                cancellation.check()
        finally:
            ended.append(1)

    async def scenario() -> None:
        many = [asyncio.create_task(decoder.once("a", work, 20)) for _ in range(5)]
        await until(lambda: begun)
        for task in many[:4]:
            task.cancel()
        await asyncio.sleep(0.05)
        assert not ended
        many[4].cancel()
        await asyncio.gather(*many, return_exceptions=True)
        again = decoder.once("a", lambda: PictureFile(b"file"), 20)  # not that of the canceled work
        assert (await again).data == b"file"
        assert (len(begun), len(ended)) == (1, 1)

    asyncio.run(scenario())


class OneCodec:
    """A library with one codec, which keeps what the decodes raise."""

    def __init__(self, codec: Codec) -> None:
        self.used, self.errors = codec, list[Exception]()

    def codec(self, _: Bitstream) -> "OneCodec":
        return self

    def latents(self, b: Bitstream) -> object:
        try:
            return self.used.latents(b)
        except Canceled as e:
            self.errors.append(e)
            raise


def test_the_deadline_of_a_slow_model_is_explained_and_ends_the_decode() -> None:
    tensors = zoo.with_tables(nets.random("mbt2018"))
    library = OneCodec(zoo.from_tensors(tensors, 1, model="mbt2018"))
    b = library.used.encode(torch.rand(1, 3, 1024, 1024), "compressai", "float")
    decoder = InstantDecoder(library, ServiceSettings(request_timeout_s=0.05), PixelBudget(40))  # type: ignore[arg-type]

    async def scenario() -> None:
        with pytest.raises(DeadlineExceeded) as late:
            await decoder.check(b, NOBODY)
        assert str(late.value) == (
            "the picture was not ready within 0.05 s; mbt2018 takes about 3 s for its 1.0 "
            "megapixels: send a smaller picture, or decode it with the command afterimage decode"
        )
        await until(lambda: not decoder._line._calls)
        assert library.errors
        assert await decoder.run(lambda: 7) == 7

    asyncio.run(scenario())
