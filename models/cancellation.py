"""Cancellation of work in threads: long loops call `check`, which ends work that nobody needs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from models.errors import Canceled

_canceled: ContextVar[threading.Event | None] = ContextVar("canceled", default=None)


@contextmanager
def cancelable(canceled: threading.Event) -> Iterator[None]:
    """Let `check`, called within the block by this thread, raise once `canceled` is set."""
    token = _canceled.set(canceled)
    try:
        yield
    finally:
        _canceled.reset(token)


def check() -> None:
    """Raise `Canceled` if the work of this thread has been canceled."""
    canceled = _canceled.get()
    if canceled is not None and canceled.is_set():
        raise Canceled("nobody waits for the result any more")
