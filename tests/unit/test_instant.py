"""Instant pictures take turns: threads are bounded, whoever waits for them."""

import asyncio
import threading

import pytest

from models.library import Library
from service.instant import Instant
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
