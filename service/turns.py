"""Lets the requests of all clients begin in turns, and new connections first."""

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from service import addresses

MAX_ACCEPTED = 64
"""Largest number of successive rounds in which only connections are accepted."""


class Turns:
    """ASGI middleware: one request begins in each round of the event loop, and clients take turns.

    A request blocks the event loop for a millisecond or more before its first `await`. If hundreds
    began in one round, requests of other clients, such as health probes, would wait for all of
    them. uvloop accepts one connection per round, and new connections go first: a request waits
    while `accepted()`, the number of connections accepted so far, grows, for at most `MAX_ACCEPTED`
    rounds.
    """

    def __init__(self, app: ASGIApp, accepted: Callable[[], int]) -> None:
        self._app, self._accepted = app, accepted
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._taken = False  # whether a request has begun in this round, or others wait
        self._seen = self._skipped = 0  # connections accepted so far; rounds without a request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._turn(scope)
        await self._app(scope, receive, send)

    async def _turn(self, scope: Scope) -> None:
        """Return when the request may begin.

        It begins at once if no other request has begun in this round or waits, and no connection
        has been accepted since the last round.
        """
        loop = asyncio.get_running_loop()
        at_once = not self._taken and self._accepted() == self._seen
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
        if at_once:
            return
        client = addresses.network(scope["client"][0]) if scope["client"] else ""
        turn = loop.create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        await turn

    def _next(self) -> None:
        """Let one of those that wait begin, of the client that has waited longest."""
        loop = asyncio.get_running_loop()
        accepted, self._seen = self._accepted() - self._seen, self._accepted()
        if accepted and self._waiting and self._skipped < MAX_ACCEPTED:
            self._skipped += 1
            loop.call_soon(self._next)
            return
        self._skipped = 0
        while self._waiting:
            client = next(iter(self._waiting))
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind all other clients
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._next)
                return
        self._taken = False
