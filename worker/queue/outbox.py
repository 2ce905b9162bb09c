"""The queue of webhooks: a sorted set, message -> when its next attempt is due, and their hashes.

Whoever takes a message counts the attempt and moves it behind the end of a lease, in one script:
nobody else takes it meanwhile, and what a killed consumer held comes up again. The count is also
the token by which its taker may note what came of it, unless the lease ended and another took it.
All times are the server's. The scripts name keys that they find: one server, no Redis cluster.
"""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from redis.client import Pipeline

from models.errors import ParameterError
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S, Store

MAX_URLS = 32
"""Webhook URLs of one job; callers who submit the same decode share them."""

MESSAGE_TTL_S = 3 * 24 * 3600
"""How long a message is kept after it was last put off; longer than any interval."""
DEAD_TTL_S = 7 * 24 * 3600
"""How long those that were given up are kept after the last of them."""
DEAD_KEPT = 1000
"""How many of them: the last ones."""

_MOVE = """
local time = redis.call('TIME')
for _, url in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local id = 'msg_' .. ARGV[2] .. string.sub(redis.sha1hex(url), 1, 16)
  local key = ARGV[1] .. id
  redis.call('HSET', key, 'url', url, 'body', ARGV[3], 'job', ARGV[4], 'attempts', 0)
  redis.call('EXPIRE', key, ARGV[5])
  redis.call('ZADD', KEYS[2], time[1] + time[2] / 1e6, id)
  redis.call('EXPIRE', KEYS[2], ARGV[5])
end
redis.call('DEL', KEYS[1])
"""
_CLAIM = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
while true do
  local id = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 1)[1]
  if not id then return nil end
  local key = ARGV[1] .. id
  if redis.call('EXISTS', key) == 1 then
    redis.call('ZADD', KEYS[1], now + ARGV[2], id)
    local attempts = redis.call('HINCRBY', key, 'attempts', 1)
    local found = redis.call('HMGET', key, 'url', 'body', 'job')
    return {id, found[1], found[2], found[3], tostring(attempts)}
  end
  redis.call('ZREM', KEYS[1], id)
end
"""


@dataclass(frozen=True, slots=True)
class Message:
    """An event for one receiver; `attempts` includes the one that it was taken for."""

    id: str
    url: str
    body: str  # the same at every attempt
    job: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Messages:
    """Over the queue store."""

    store: Store

    def register(self, job_id: str, url: str, at_most: int) -> bool:
        """Remember where to tell the job's end; False where that would be one too many."""
        key = self._registered(job_id)
        with self.store.queue.pipeline() as pipe:
            pipe.sadd(key, url)
            pipe.scard(key)
            pipe.expire(key, RECORD_TTL_S)
            added, count, _ = pipe.execute()
        if added and count > at_most:
            self.store.queue.srem(key, url)
            return False
        return True

    def move(self, job_id: str, body: str, pipe: Pipeline | None) -> None:
        """A message to each registered URL, due now; the URLs are forgotten."""
        (pipe or self.store.queue).eval(
            _MOVE, 2, self._registered(job_id), self.due,
            self.key(""), uuid.uuid4().hex[:16], body, job_id, MESSAGE_TTL_S,
        )  # fmt: skip

    def claim(self, lease_s: float) -> Message | None:
        """Take what has been due longest, for so long; None where nothing is due."""
        found = self.store.queue.eval(_CLAIM, 1, self.due, self.key(""), lease_s)
        if not found:
            return None
        name, url, body, job, attempts = (value.decode() for value in found)
        return Message(name, url, body, job, int(attempts))

    def delivered(self, message: Message) -> bool:
        """It is done."""
        return self._note(message, lambda pipe, _: self._drop(pipe, message))

    def put_off(self, message: Message, seconds: float) -> bool:
        """It is due again then."""

        def later(pipe: Pipeline, now: float) -> None:
            pipe.zadd(self.due, {message.id: now + seconds})
            pipe.expire(self.due, MESSAGE_TTL_S)
            pipe.expire(self.key(message.id), MESSAGE_TTL_S)

        return self._note(message, later)

    def give_up(self, message: Message, error: str) -> bool:
        """It is not tried again, but kept with the last error among the dead."""

        def bury(pipe: Pipeline, now: float) -> None:
            self._drop(pipe, message)
            pipe.lpush(self.dead, json.dumps({**asdict(message), "error": error, "at": now}))
            pipe.ltrim(self.dead, 0, DEAD_KEPT - 1)
            pipe.expire(self.dead, DEAD_TTL_S)

        return self._note(message, bury)

    def _drop(self, pipe: Pipeline, message: Message) -> None:
        pipe.delete(self.key(message.id))
        pipe.zrem(self.due, message.id)

    def _note(self, message: Message, change: Callable[[Pipeline, float], None]) -> bool:
        """Make the change; nothing, and False, where another has taken the message since."""
        key = self.key(message.id)
        with self.store.queue.pipeline() as pipe, suppress(redis.WatchError):
            pipe.watch(key)  # type: ignore[no-untyped-call]
            if pipe.hget(key, "attempts") != str(message.attempts).encode():
                return False
            seconds, micros = self.store.queue.time()
            pipe.multi()
            change(pipe, seconds + micros / 1e6)
            pipe.execute()
            return True
        return False

    def key(self, message_id: str) -> str:
        """Of a message's hash."""
        return self.store.key("webhook", message_id)

    @property
    def due(self) -> str:
        """Sorted set: message -> when it is due, or when its taker's lease ends."""
        return self.store.key("webhooks")

    @property
    def dead(self) -> str:
        """List of what was given up, JSON, the newest first."""
        return self.store.key("webhooks", "dead")

    def _registered(self, job_id: str) -> str:
        """Set of URLs that wait for the job's end."""
        return self.store.key("webhooks", "of", job_id)


def register(store: Store, job_id: str, url: str) -> None:
    """Tell `url`, once, when the job ends. Raises `ParameterError` beyond `MAX_URLS`."""
    if not Messages(store).register(job_id, url, MAX_URLS):
        raise ParameterError(f"webhook: this decode has {MAX_URLS} already")


def event(state: JobState) -> tuple[str, dict[str, Any]]:
    """Type and data of what is told about a job that ended."""
    picture = f"/v1/decodes/{state.id}/image" if state.status == "succeeded" else None
    decode = state.decode
    return f"decode.{state.status}", {
        "id": state.id, "status": state.status, "tier": decode.tier, "seed": decode.seed,
        "width": decode.width, "height": decode.height, "image": picture,
        "error": state.error or None,
    }  # fmt: skip


def job_ended(
    store: Store, job_id: str, event_type: str, data: dict[str, Any], pipe: Pipeline | None = None
) -> None:
    """Queue a message to each registered URL and forget the URLs: a second call queues nothing.

    With `pipe`, that is a part of the transaction that ends the job.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"type": event_type, "timestamp": now, "data": data}
    Messages(store).move(job_id, json.dumps(body, separators=(",", ":")), pipe)
