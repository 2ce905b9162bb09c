"""Instant pictures take turns: threads are bounded, whoever waits for them."""

import asyncio
import threading

import pytest

from models.library import Library
from service.instant import Drawn, Instant
from service.problems import Busy, DeadlineExceeded
from service.settings import ServiceSettings


def instant(**settings: float) -> Instant:
    return Instant(Library({}, None), ServiceSettings(**settings))  # type: ignore[arg-type]


def test_work_whose_request_has_given_up_keeps_its_turn() -> None:
    own = instant(decodes_at_once=1, request_timeout_s=0.2)
    go, running = threading.Event(), []

    def work() -> None:
        running.append(1)
        go.wait(10)

    async def ask() -> None:
        with pytest.raises(DeadlineExceeded):
            await own.run(work)
        with pytest.raises(DeadlineExceeded):
            await own.run(work)  # the first is not done
        assert len(running) == 1
        go.set()
        assert await own.run(lambda: 7) == 7
        assert len(running) == 1  # what was given up before its turn is not begun

    asyncio.run(ask())


def test_one_picture_is_drawn_once_however_many_ask() -> None:
    own = instant(decodes_at_once=2)
    go, begun = threading.Event(), []

    def work() -> Drawn:
        begun.append(1)
        go.wait(10)
        return Drawn(b"file")

    async def ask() -> None:
        many = [asyncio.create_task(own.once("a", work)) for _ in range(100)]
        await asyncio.sleep(0.05)
        many.pop(0).cancel()  # who asked first leaves
        go.set()
        assert {drawn.file for drawn in await asyncio.gather(*many)} == {b"file"}
        assert (await own.once("a", work)).file == b"file"
        assert len(begun) == 1

    asyncio.run(ask())


def test_what_failed_is_tried_again() -> None:
    own = instant()

    def fail() -> Drawn:
        raise ValueError("broken")

    async def ask() -> None:
        both = await asyncio.gather(
            *(own.once("a", fail) for _ in range(2)), return_exceptions=True
        )
        assert [str(e) for e in both] == ["broken"] * 2
        assert (await own.once("a", lambda: Drawn(b"file"))).file == b"file"

    asyncio.run(ask())


def test_the_line_is_bounded() -> None:
    own = instant(decodes_at_once=1, waiting_line=2)
    go = threading.Event()

    async def ask() -> None:
        waiting = [asyncio.create_task(own.run(lambda: go.wait(10))) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await own.run(lambda: None)
        go.set()
        assert await asyncio.gather(*waiting) == [True] * 3

    asyncio.run(ask())
