"""The two Redis stores: the queue (job records, bitstreams) and the cache (pictures)."""

from dataclasses import dataclass

import redis
from redis.asyncio import Redis as AsyncRedis

from worker.queue import urls
from worker.settings import WorkerSettings

PICTURE_TTL_S = 24 * 3600
"""How long a finished picture is kept; the cache may evict it earlier."""
PREVIEW_TTL_S = 600
"""How long the last estimate of a running job is kept."""
DRAFT_TTL_S = 3600
"""How long an instant picture is kept for those who poll for its upgrade."""
RECORD_TTL_S = PICTURE_TTL_S + 24 * 3600
"""Records and bitstreams outlive the picture, so that it can be made again."""

CONNECT_S = 2
"""How long to wait for a server before it counts as away."""

ANSWER_S = 5
"""How long to wait for an answer."""
LISTENERS = 5000
"""Reads that may wait at once in a process, each on a connection: half of what Redis takes in all.
redis-py's own limit is 100."""

BLOCK_S = 5
"""How long one read may wait for something to happen."""

OLDEST = (6, 2)
"""The first Redis that has all commands that are sent."""

RedisError = redis.RedisError
"""What every use of a store may raise."""


@dataclass(frozen=True, slots=True)
class Store:
    """Connections to both stores. `cache` may be the same server as `queue`."""

    queue: redis.Redis
    cache: redis.Redis
    prefix: str

    def key(self, *parts: str) -> str:
        """A prefixed key."""
        return ":".join((self.prefix, *parts))

    def picture(self, job_id: str) -> bytes | None:
        """The finished picture of a job, a PNG file, while it is kept."""
        value: bytes | None = self.cache.get(self.key("picture", job_id))  # type: ignore[assignment]
        return value

    def put_picture(self, job_id: str, png: bytes) -> None:
        """Keep a finished picture."""
        self.cache.set(self.key("picture", job_id), png, ex=PICTURE_TTL_S)

    def preview(self, job_id: str) -> bytes | None:
        """The last estimate that a worker drew of a running job, a WebP file."""
        value: bytes | None = self.cache.get(self.key("preview", job_id))  # type: ignore[assignment]
        return value

    def put_preview(self, job_id: str, picture: bytes) -> None:
        """Keep an estimate."""
        self.cache.set(self.key("preview", job_id), picture, ex=PREVIEW_TTL_S)

    def draft(self, digest: str, codec: str, format: str) -> bytes | None:
        """The instant picture of a bitstream, a file, while its upgrade may be asked about."""
        value: bytes | None = self.cache.get(self.key("draft", digest, codec, format))  # type: ignore[assignment]
        return value

    def put_draft(self, digest: str, codec: str, format: str, picture: bytes) -> None:
        """Keep an instant picture."""
        self.cache.set(self.key("draft", digest, codec, format), picture, ex=DRAFT_TTL_S)

    def bitstream(self, digest: str) -> bytes | None:
        """A submitted bitstream, while it is kept."""
        value: bytes | None = self.queue.get(self.key("bitstream", digest))  # type: ignore[assignment]
        return value

    def fullness(self) -> float:
        """Used part of the queue's memory, 0 where it has no limit."""
        memory = self.queue.info("memory")
        limit = memory["maxmemory"]
        return memory["used_memory"] / limit if limit else 0.0

    def ping(self) -> None:
        """Raise `RedisError` unless both servers answer."""
        self.queue.ping()
        self.cache.ping()

    def check(self) -> None:
        """`ping`; raises `NoRedis` where the queue's server is too old."""
        self.ping()
        version = str(self.queue.info("server")["redis_version"])
        if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
            raise urls.NoRedis(f"the queue's Redis is {version}; 6.2 or later is needed")

    def close(self) -> None:
        """Close all connections."""
        urls.close(self.queue)
        urls.close(self.cache)


def connect(settings: WorkerSettings) -> Store:
    """Connections as configured, made lazily: nothing is sent yet.

    Raises `NoRedis` for a URL that is none.
    """
    queue, cache = settings.redis_url, settings.cache_redis_url or settings.redis_url
    waits = {"socket_connect_timeout": CONNECT_S, "socket_timeout": ANSWER_S}
    return Store(urls.client(queue, **waits), urls.client(cache, **waits), settings.prefix)


def streams(settings: WorkerSettings) -> AsyncRedis:
    """Connections to the queue for reads that wait up to `BLOCK_S`, within an event loop."""
    waits = {"socket_connect_timeout": CONNECT_S, "socket_timeout": BLOCK_S + ANSWER_S}
    return urls.asynchronous(settings.redis_url, max_connections=LISTENERS, **waits)
