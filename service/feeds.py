"""Follows decodes and batches for all event streams and waiting requests of an API process.

One blocking read waits for the events of everything that is followed, and one thread reads the
records. Requests wait in the event loop. So the cost depends on how much is followed and on what
happens to it, not on how many clients follow it.
"""

import asyncio
import bisect
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

import anyio
import anyio.to_thread
from redis.asyncio import Redis as AsyncRedis
from redis.client import Pipeline

from worker.queue.events import END_OF, Event
from worker.queue.jobs import Jobs
from worker.queue.store import RedisError

log = logging.getLogger(__name__)

REFRESH_S = 5.0
"""Interval at which the records of all that is followed are read."""
BLOCK_MS = 100
"""How long one read waits for events. What begins to be followed meanwhile joins the next read, so
its events may be late by as much."""
PAUSE_S = 1e-5
"""Pause after a read, for each stream that it has read: thousands of streams are read less often,
so that they do not use the event loop up."""
AT_ONCE = 100
"""Records that one transaction reads."""
ENDS = frozenset({*END_OF.values(), "ended"})
"""Kinds of a last event."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_Position = tuple[int, int]


class Source(Protocol[T_co]):
    """A decode or a batch: how its record is read."""

    @property
    def stream(self) -> str:
        """Redis key of its events."""

    def ask(self, pipe: Pipeline, now: float, viewers: Collection[str]) -> None:
        """Add the commands that read the record, and those that are due with every reading.

        `now` is the time of the Redis server, `viewers` are callers. Runs in a thread.
        """

    def parse(self, replies: Sequence[Any]) -> T_co:
        """Return the record, from the replies to these commands."""


@dataclass(eq=False, slots=True)
class Feed(Generic[T]):
    """The events and the record of a decode or batch, while at least one request follows it."""

    source: Source[T]
    record: T | None = None
    events: list[Event] = field(default_factory=list)
    newest: str = ""
    """Id of the latest event; empty until the stream has been read."""
    followers: int = 0
    viewers: Counter[str] = field(default_factory=Counter)
    """The callers of the followers that asked to be passed to `Source.ask`."""
    asked: int = 0
    answered: int = 0
    """Numbers of the latest request for the record and of the latest that was answered; the record
    is stale while `asked > answered`."""
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Is replaced after each change."""
    version: int = 0
    _positions: list[_Position] = field(default_factory=list)

    def add(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> bool:
        """Add what has been read from the stream; True if a last event is among it."""
        ended = False
        for event in map(Event.of, entries):
            position = _position(event.id)
            if self._positions and position <= self._positions[-1]:
                continue  # read twice
            if event.kind == "queued" and self.events and self.events[-1].kind in ENDS:
                self.events.clear()  # of an earlier run
                self._positions.clear()
            self.events.append(event)
            self._positions.append(position)
            self.newest = event.id
            ended = ended or event.kind in ENDS
        return ended

    def after(self, event_id: str) -> list[Event]:
        """The events after this one."""
        return self.events[bisect.bisect_right(self._positions, _position(event_id)) :]

    def notify(self) -> None:
        """Wake the requests that wait for a change."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(eq=False, slots=True)
class Follower(Generic[T]):
    """One request that follows a decode or batch."""

    _feed: Feed[T]
    _feeds: "Feeds"
    _ticket: int
    _seen: int = -1

    @property
    def record(self) -> T:
        """The record; may be read once `wait` has returned True."""
        return cast(T, self._feed.record)

    def after(self, event_id: str) -> list[Event]:
        """The events after this one."""
        return self._feed.after(event_id)

    @property
    def newest(self) -> str:
        """The id of the latest event; `0-0` without any."""
        return self._feed.newest

    async def wait(self) -> bool:
        """Return True once there is something new; False if the server stops.

        The first call returns when the record has been read. Raises `RedisError`.
        """
        feed = self._feed
        while not self._feeds.closed:
            if feed.error is not None:
                raise feed.error.with_traceback(None)
            if feed.version != self._seen and feed.answered >= self._ticket:
                self._seen = feed.version
                return True
            await feed.changed.wait()
        return False


class Feeds:
    """What the requests of this process follow; `run` keeps it up to date."""

    def __init__(self, jobs: Jobs, connection: AsyncRedis) -> None:
        self.closed = False
        self._jobs, self._connection = jobs, connection
        self._feeds: dict[str, Feed[Any]] = {}
        self._followed, self._wanted = asyncio.Event(), asyncio.Event()
        self._threads = anyio.CapacityLimiter(1)
        self._refresh_at = 0.0  # on the event loop's clock

    @contextlib.contextmanager
    def follow(self, source: Source[T], viewer: str | None = None) -> Iterator[Follower[T]]:
        """Follow a decode or batch within the block; others may follow it already."""
        feed = self._feeds.setdefault(source.stream, Feed(source))
        feed.followers += 1
        if viewer is not None:
            feed.viewers[viewer] += 1
        self._want(feed)
        try:
            yield Follower(feed, self, feed.asked)
        finally:
            feed.followers -= 1
            if viewer is not None:
                feed.viewers[viewer] -= 1
                if not feed.viewers[viewer]:
                    del feed.viewers[viewer]
            if not feed.followers and self._feeds.get(source.stream) is feed:
                del self._feeds[source.stream]

    def close(self) -> None:
        """End all waiting, and `run`: the server stops."""
        self.closed = True
        self._followed.set()
        self._wanted.set()
        for feed in self._feeds.values():
            feed.notify()

    async def run(self) -> None:
        """Read events and records until `close` is called."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat(self._read_events))
            tasks.create_task(self._repeat(self._read_records))

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat `step`; an error ends all waiting, but not this.

        A task that is only canceled may go on, because redis-py can swallow the cancellation.
        """
        while not self.closed:
            try:
                await step()
            except Exception as e:
                if not isinstance(e, RedisError):
                    log.exception("events cannot be read")
                for feed in self._feeds.values():
                    feed.error = e
                    feed.notify()
                self._feeds.clear()

    def _want(self, feed: Feed[Any]) -> None:
        """Let the record be read again."""
        feed.asked += 1
        self._wanted.set()

    async def _read_events(self) -> None:
        """Wait for events of all feeds whose records have been read."""
        await self._followed.wait()
        streams = {stream: feed.newest for stream, feed in self._feeds.items() if feed.newest}
        if not streams:
            self._followed.clear()
            return
        found: Any = await self._connection.xread(streams, block=BLOCK_MS)  # type: ignore[arg-type]
        for stream, entries in found:
            feed = self._feeds.get(stream.decode())
            if feed is None or not feed.newest:
                continue
            if feed.add(entries):
                self._want(feed)  # it notifies
            else:
                feed.notify()
        await asyncio.sleep(PAUSE_S * len(streams))

    async def _read_records(self) -> None:
        """Wait until records are wanted, and read them; every `REFRESH_S` read all."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._refresh_at if self._feeds else None):
                await self._wanted.wait()
        self._wanted.clear()
        now = asyncio.get_running_loop().time()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_S
            for feed in self._feeds.values():
                feed.asked += 1
        wanted = [feed for feed in self._feeds.values() if feed.asked > feed.answered]
        asked, viewers = [feed.asked for feed in wanted], [[*feed.viewers] for feed in wanted]
        replies = await anyio.to_thread.run_sync(self._load, wanted, viewers, limiter=self._threads)
        for feed, number, (record, entries) in zip(wanted, asked, replies, strict=True):
            feed.add(entries)
            feed.newest = feed.newest or "0-0"
            feed.record, feed.answered = record, number
            feed.notify()
        self._followed.set()

    def _load(
        self, feeds: Sequence[Feed[Any]], viewers: Sequence[Collection[str]]
    ) -> list[tuple[Any, Any]]:
        """The record of each feed, and its events that have not been read; both of one time."""
        found: list[tuple[Any, Any]] = []
        now = self._jobs.now() if feeds else 0.0
        for at in range(0, len(feeds), AT_ONCE):
            part, sizes = feeds[at : at + AT_ONCE], []
            with self._jobs.store.queue.pipeline() as pipe:
                for feed, callers in zip(part, viewers[at : at + AT_ONCE], strict=True):
                    before = len(pipe)
                    feed.source.ask(pipe, now, callers)
                    pipe.xrange(feed.source.stream, f"({feed.newest}" if feed.newest else "-")
                    sizes.append(len(pipe) - before)
                replies = iter(pipe.execute())
            for feed, size in zip(part, sizes, strict=True):
                *record, entries = itertools.islice(replies, size)
                found.append((feed.source.parse(record), entries))
        return found


def _position(event_id: str) -> _Position:
    """An event's id, or the number before its hyphen alone, as numbers that can be compared."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)
