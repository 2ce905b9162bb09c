"""Waiting for work on behalf of a connection."""

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from service.waiter import NOBODY, Waiter


def test_work_is_canceled_when_the_client_disconnects() -> None:
    async def scenario() -> None:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        work: asyncio.Future[int] = asyncio.Future()
        waiting = asyncio.create_task(Waiter("caller", messages.get).wait_for(work))
        messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        await asyncio.sleep(0.01)
        assert not waiting.done()
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(ClientDisconnect):
            await waiting
        assert work.cancelled()

    asyncio.run(scenario())


def test_a_client_that_stays_gets_the_result_or_the_error() -> None:
    async def scenario() -> None:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for waiter in (Waiter("caller", messages.get), NOBODY):
            assert await waiter.wait_for(asyncio.sleep(0.01, 7)) == 7

            async def fail() -> None:
                raise ValueError("broken")

            with pytest.raises(ValueError, match="broken"):
                await waiter.wait_for(fail())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
