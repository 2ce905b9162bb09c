"""Crashes of workers by bitstream: a bitstream on which several workers crashed is refused.

The sorted set `quarantined` lists such bitstreams for operators: digest -> time at which it ends.
"""

import time

from redis.client import Pipeline

from worker.queue.records import JobState
from worker.queue.store import Store

MAX_CRASHES = 2
"""Number of workers that may crash on one bitstream before it is quarantined."""
CRASHES_TTL_S = 24 * 3600
"""How long crashes on a bitstream are remembered after the latest one."""
QUARANTINED = (
    f"{MAX_CRASHES} workers crashed while they decoded this bitstream; it is refused for "
    f"{CRASHES_TTL_S // 3600} hours"
)


class Quarantine:
    """Counts the attempts that crashed on each bitstream."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def count(self, digest: str) -> int:
        """Workers that crashed on a bitstream in the last `CRASHES_TTL_S` seconds."""
        return int(self._store.queue.scard(self._crashes(digest)))

    def holds(self, digest: str) -> bool:
        """Whether the bitstream is refused."""
        return self.count(digest) >= MAX_CRASHES

    def add(self, state: JobState, pipe: Pipeline) -> bool:
        """Count a crash of the job's worker, as part of `pipe`; True if that quarantines the
        bitstream."""
        digest = state.decode.digest
        counted = self._store.queue.sismember(self._crashes(digest), state.owner)
        pipe.sadd(self._crashes(digest), state.owner)
        pipe.expire(self._crashes(digest), CRASHES_TTL_S)
        if self.count(digest) + (not counted) < MAX_CRASHES:
            return False
        pipe.zadd(self._list, {digest: time.time() + CRASHES_TTL_S})
        pipe.expire(self._list, CRASHES_TTL_S)
        return True

    def forgive(self, state: JobState) -> None:
        """Uncount the crash of an attempt: its worker is alive, and only lost its connection."""
        self._store.queue.srem(self._crashes(state.decode.digest), state.owner)

    def reset(self, digest: str, pipe: Pipeline) -> None:
        """Forget all crashes on a bitstream, because a picture was drawn from it."""
        pipe.delete(self._crashes(digest))
        pipe.zrem(self._list, digest)

    def release(self, digest: str) -> bool:
        """Forget all crashes on a bitstream; False if it was not quarantined."""
        held = self.holds(digest)
        with self._store.queue.pipeline() as pipe:
            self.reset(digest, pipe)
            pipe.execute()
        return held

    def all(self) -> dict[str, float]:
        """Quarantined bitstreams: digest -> when that ends, seconds since the epoch."""
        entries: list[tuple[bytes, float]] = self._store.queue.zrange(  # type: ignore[assignment]
            self._list, 0, -1, withscores=True
        )
        until = {value.decode(): end for value, end in entries if end > time.time()}
        return {digest: end for digest, end in until.items() if self.holds(digest)}

    @property
    def _list(self) -> str:
        return self._store.key("quarantined")

    def _crashes(self, digest: str) -> str:
        """Key of the set of owners of attempts that crashed on a bitstream."""
        return self._store.key("deaths", digest)
