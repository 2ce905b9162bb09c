"""How many requests a service wants at a time: fewer after each refusal, more after successes."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import anyio

from models.errors import AfterimageError

REFUSALS = 16
"""Refusals in a row, of all requests together, after which the service is given up."""
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
"""Shortest and longest pause after a refusal; `Retry-After` chooses between them."""
_REFUSED = frozenset({429, 503})
"""Statuses of a service that wants fewer requests."""
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Refused(AfterimageError):
    """The service has refused all requests for some time."""


class Pace:
    """Runs up to `most` requests at a time.

    A refusal (429, 503) halves the number, and no request is sent until its `Retry-After` is over.
    Each success lets it grow, by one in as many successes as requests may run at a time.
    """

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        """Requests that may run at a time."""
        self._most, self._active = most, 0
        self._ever_accepted, self._refusals = False, 0
        self._resume_at = 0.0
        self._left = anyio.Event()

    async def run(self, request: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """Return the result of a request, which is sent again while the service refuses it.

        Raises `Refused`, and `TransportError` if the service cannot be reached or, once it has
        accepted a request, is away for long.
        """
        from httpx import TransportError

        from service.client import ApiError

        while True:
            await self._enter()
            try:
                result = await request(*arguments)
                self.accepted()
                self.limit = min(self._most, self.limit + 1 / self.limit)
                return result
            except ApiError as e:
                if e.status not in _REFUSED:
                    raise
                self._refused(e.retry_after_s)
                if self._refusals > REFUSALS:
                    raise Refused(f"{self._refusals} requests in a row were refused: {e}") from e
            except TransportError:
                self._refused(0)
                if not self._ever_accepted or self._refusals > REFUSALS:
                    raise
            finally:
                self._active -= 1
                self._left.set()
                self._left = anyio.Event()

    def accepted(self) -> None:
        """Record that the service has accepted a request."""
        self._ever_accepted, self._refusals = True, 0

    def _refused(self, retry_after_s: float) -> None:
        """Record a refusal. Those of requests that were sent before a pause count as one."""
        now = time.monotonic()
        if now >= self._resume_at:
            self.limit = max(1.0, self.limit / 2)
            self._refusals += 1
        pause_s = min(max(retry_after_s, MIN_PAUSE_S), MAX_PAUSE_S)
        self._resume_at = max(self._resume_at, now + pause_s)

    async def _enter(self) -> None:
        """Wait until one more request may run."""
        while True:
            pause_s = self._resume_at - time.monotonic()
            if pause_s > 0:
                await anyio.sleep(pause_s)
            elif self._active >= int(self.limit):
                await self._left.wait()
            else:
                self._active += 1
                return
