"""A lock that threads take in the order of their work's size, smallest first."""

import itertools
import threading
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock for short steps of long work: between two steps, smaller work goes first.

    `threading.Lock` would let the thread that releases it take it again at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # (size, number), in order
        self._numbers = itertools.count()
        self._taken = False

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold the lock during the block, for a step of work of `size`."""
        with self._changed:
            ticket = size, next(self._numbers)
            insort(self._waiting, ticket)
            try:
                self._changed.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
            finally:
                self._waiting.remove(ticket)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
