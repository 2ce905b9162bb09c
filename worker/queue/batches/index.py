"""Which batches there are, newest first: of one caller, or of all."""

from collections.abc import Iterator
from typing import cast

import redis

from worker.queue.store import Store

SLICE = 100
"""Ids that one request to Redis reads."""
OLDEST = 10
"""Oldest ids that each new batch checks, so that those of expired batches do not pile up."""


def add(store: Store, pipe: redis.client.Pipeline, id: str, caller: str, created: float) -> None:
    """Add a batch, as part of the transaction `pipe`."""
    for key in _keys(store, caller):
        pipe.zadd(key, {id: created})


def forget_expired(store: Store, caller: str) -> None:
    """Remove the oldest ids, if their batches have expired."""
    for key in _keys(store, caller):
        oldest = cast(list[bytes], store.queue.zrange(key, 0, OLDEST - 1))
        with store.queue.pipeline(transaction=False) as pipe:
            for id in oldest:
                pipe.exists(store.key("batch", id.decode()))
            expired = [id for id, kept in zip(oldest, pipe.execute(), strict=True) if not kept]
        if expired:
            store.queue.zrem(key, *expired)


def newest(store: Store, caller: str | None, after: str = "") -> Iterator[str] | None:
    """The ids of a caller's batches, or of all for None, that are older than `after`.

    Without `after` it begins with the newest one. None if there is no batch `after`.
    """
    key = _keys(store, caller or "")[caller is None]
    first = 0
    if after:
        rank = cast(int | None, store.queue.zrevrank(key, after))
        if rank is None:
            return None
        first = rank + 1
    return _ids(store, key, first)


def _ids(store: Store, key: str, first: int) -> Iterator[str]:
    while found := cast(list[bytes], store.queue.zrevrange(key, first, first + SLICE - 1)):
        yield from (id.decode() for id in found)
        first += SLICE


def _keys(store: Store, caller: str) -> tuple[str, str]:
    """Sorted sets of the caller's batches and of all: id -> time of creation."""
    return store.key("batches-of", caller), store.key("batches-newest")
