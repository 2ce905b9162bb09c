"""Wait until a condition holds, or until a decode has ended."""

import contextlib
import time
from collections.abc import Callable

import httpx
import pytest
import redis


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> float:
    """Wait until `condition()` is true, and return the seconds that this took.

    Redis errors count as false: the server may be restarting. Raises `TimeoutError`, whose message
    names `what`.
    """
    began = time.monotonic()
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return time.monotonic() - began
        elapsed = time.monotonic() - began
        if elapsed > seconds:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(min(0.01 + elapsed / 20, 0.05))  # a condition may be a request over HTTP


def wait_for(client: httpx.Client, location: str, seconds: float = 120) -> dict[str, object]:
    """Poll a decode until it is neither queued nor running, and return its state."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state: dict[str, object] = client.get(location).json()
        if state["status"] not in {"queued", "running"}:
            return state
        time.sleep(0.05)
    pytest.fail(f"{location} did not end within {seconds} s")
