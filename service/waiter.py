"""Who waits for work: a caller, and the connection whose end makes the work useless."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.auth import Caller

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiter:
    """A caller that waits for a response; without `receive` it never leaves."""

    caller: str = ""
    receive: Receive | None = None

    @classmethod
    def of(cls, request: Request, caller: Caller) -> "Waiter":
        """The waiter for the response to a request whose body has been read."""
        return cls(caller.name, request.receive)

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Return the result of `work`.

        If the client disconnects first, cancels `work` and raises `ClientDisconnect`.
        """
        if self.receive is None:
            return await work
        task = asyncio.ensure_future(work)
        left = asyncio.create_task(_disconnected(self.receive))
        try:
            await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            left.cancel()
            task.cancel()
            await asyncio.gather(left, task, return_exceptions=True)


NOBODY = Waiter()
"""Waits for work to its end."""


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
