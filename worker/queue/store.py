"""The two Redis stores: the queue (job records, bitstreams) and the cache (pictures)."""

from dataclasses import dataclass

import redis
from redis.asyncio import Redis as AsyncRedis

from worker.queue import urls
from worker.queue.results import Results
from worker.settings import WorkerSettings

PICTURE_TTL_S = 24 * 3600
"""How long a finished picture is kept; the cache may evict it earlier."""
PREVIEW_TTL_S = 600
"""How long the latest preview of a running job is kept."""
DRAFT_TTL_S = 3600
"""How long an instant picture is kept for clients that poll for the perceptual one."""
RECORD_TTL_S = PICTURE_TTL_S + 24 * 3600
"""How long records and bitstreams are kept: longer than the picture, so that it can be redrawn."""
SUBMITTERS_TTL_S = 2 * RECORD_TTL_S
"""How long the names of a job's submitters are kept after its submission and after its end: longer
than its record, which is renewed while the job runs."""

CONNECT_TIMEOUT_S = 2
"""Timeout of connecting to a server."""
READ_TIMEOUT_S = 5
"""Timeout of a reply."""

MIN_VERSION = (6, 2)
"""The first version of Redis that has all commands in use."""

RedisError = redis.RedisError
"""Any use of a store may raise this."""

_PUBLISH = """
local latest = tonumber(redis.call('get', KEYS[3]) or '0')
local shown = redis.call('exists', KEYS[2]) == 1
if shown and tonumber(ARGV[1]) < latest then
  redis.call('del', KEYS[1])
elseif redis.call('exists', KEYS[1]) == 1 then
  redis.call('rename', KEYS[1], KEYS[2])
  redis.call('expire', KEYS[2], ARGV[2])
  redis.pcall('set', KEYS[3], ARGV[1], 'EX', ARGV[2])
  shown = true
end
return shown
"""


@dataclass(frozen=True, slots=True)
class Store:
    """Connections to both stores. `cache` may be the same server as `queue`.

    With `results`, pictures that the cache has lost are read from an object store.
    """

    queue: redis.Redis
    cache: redis.Redis
    prefix: str
    results: Results | None = None

    def key(self, *parts: str) -> str:
        """The prefix and the parts, joined by colons."""
        return ":".join((self.prefix, *parts))

    def picture(self, job_id: str) -> bytes | None:
        """The finished picture of a job, a PNG file; None once it has expired."""
        key = self.key("picture", job_id)
        value: bytes | None = self.cache.get(key)  # type: ignore[assignment]
        if value is None and self._publish_committed(job_id):
            value = self.cache.get(key)  # type: ignore[assignment]
        return self.recall(job_id) if value is None else value

    def recall(self, job_id: str) -> bytes | None:
        """Bring a picture from the results back to the cache; None if it is not there."""
        png = self.results.read(job_id) if self.results else None
        if png is not None:
            self.cache.set(self.key("picture", job_id), png, ex=PICTURE_TTL_S, nx=True)
        return png

    def put_picture(self, job_id: str, fence: int, png: bytes) -> None:
        """Store the picture that an attempt drew; nobody sees it until it is published."""
        self.cache.set(self._drawn(job_id, fence), png, ex=PICTURE_TTL_S)

    def publish(self, job_id: str, fence: int) -> bool:
        """Publish the picture of the attempt that committed: from now on it is the job's picture.

        Returns True if the job has a picture now. Calls may be repeated. The picture of a later
        attempt is not replaced, in case this process was suspended meanwhile.
        """
        keys = self._drawn(job_id, fence), self.key("picture", job_id), self.key("shown", job_id)
        return bool(self.cache.eval(_PUBLISH, 3, *keys, str(fence), str(PICTURE_TTL_S)))

    def discard(self, job_id: str, fence: int) -> None:
        """Delete the picture of an attempt that has not committed."""
        self.cache.delete(self._drawn(job_id, fence))

    def _drawn(self, job_id: str, fence: int) -> str:
        """Key of the picture of one attempt."""
        return self.key("drawn", job_id, str(fence))

    def _publish_committed(self, job_id: str) -> bool:
        """Publish the picture of a job whose worker committed it and then died or was suspended."""
        status, fence = self.queue.hmget(self.key("job", job_id), "status", "fence")
        return status == b"succeeded" and fence is not None and self.publish(job_id, int(fence))

    def preview(self, job_id: str) -> bytes | None:
        """The latest preview of a job, a WebP file; None if there is none."""
        value: bytes | None = self.cache.get(self.key("preview", job_id))  # type: ignore[assignment]
        return value

    def put_preview(self, job_id: str, picture: bytes) -> None:
        """Store a preview of a running job."""
        self.cache.set(self.key("preview", job_id), picture, ex=PREVIEW_TTL_S)

    def draft(self, digest: str, codec: str, format: str) -> bytes | None:
        """The instant picture of a bitstream, a file in `format`; None once it has expired."""
        value: bytes | None = self.cache.get(self.key("draft", digest, codec, format))  # type: ignore[assignment]
        return value

    def put_draft(self, digest: str, codec: str, format: str, picture: bytes) -> None:
        """Store the instant picture of a bitstream."""
        self.cache.set(self.key("draft", digest, codec, format), picture, ex=DRAFT_TTL_S)

    def bitstream(self, digest: str) -> bytes | None:
        """A submitted bitstream; None once it has expired."""
        value: bytes | None = self.queue.get(self.key("bitstream", digest))  # type: ignore[assignment]
        return value

    def fullness(self) -> float:
        """Used fraction of the queue's maxmemory; 0 without a limit."""
        memory = self.queue.info("memory")
        limit = memory["maxmemory"]
        return memory["used_memory"] / limit if limit else 0.0

    def ping(self) -> None:
        """Raise `RedisError` unless both servers respond."""
        self.queue.ping()
        self.cache.ping()

    def check(self) -> None:
        """Ping both servers. Raises `NoRedis` if the queue's Redis is too old."""
        self.ping()
        version = str(self.queue.info("server")["redis_version"])
        if tuple(int(n) for n in version.split(".")[:2]) < MIN_VERSION:
            raise urls.NoRedis(f"the queue's Redis has version {version}; use 6.2 or later")

    def close(self) -> None:
        """Close all connections."""
        urls.close(self.queue)
        urls.close(self.cache)


def connect(settings: WorkerSettings, results: Results | None = None) -> Store:
    """Create clients of the configured stores, which connect on first use.

    Raises `NoRedis` for an invalid URL.
    """
    queue, cache = settings.redis_url, settings.cache_redis_url or settings.redis_url
    timeouts = {"socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_timeout": READ_TIMEOUT_S}
    clients = urls.client(queue, **timeouts), urls.client(cache, **timeouts)
    return Store(*clients, settings.prefix, results)


def streams(settings: WorkerSettings) -> AsyncRedis:
    """An asyncio client of the queue, for reads that block for less than `READ_TIMEOUT_S`."""
    return urls.asynchronous(
        settings.redis_url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=READ_TIMEOUT_S,
    )
