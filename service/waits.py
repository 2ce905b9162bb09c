"""Limits how many event streams and waiting requests of one caller are open at once."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from service.problems import RETRY_S, TooManyRequests


class Waits:
    """Counts the event streams and waiting requests of each caller; `limit` are allowed."""

    def __init__(self, limit: int) -> None:
        self._limit, self._of = limit, Counter[str]()

    @contextlib.contextmanager
    def one(self, caller: str) -> Iterator[bool]:
        """Count one within the block; yields False if it exceeds the limit."""
        self._of[caller] += 1
        try:
            yield self._of[caller] <= self._limit
        finally:
            self._of[caller] -= 1
            if not self._of[caller]:
                del self._of[caller]

    @contextlib.contextmanager
    def stream(self, caller: str) -> Iterator[None]:
        """Count an event stream within the block. Raises `TooManyRequests` beyond the limit."""
        with self.one(caller) as allowed:
            if not allowed:
                most = f"you have {self._limit} event streams and waiting requests"
                raise TooManyRequests(
                    f"{most}, which is the limit; close some of them",
                    {"Retry-After": str(RETRY_S)},
                )
            yield
