"""Outbox of webhook messages: registered URLs, messages that are due, and dead letters.

A sorted set holds the time at which each message is due; a hash per message holds the rest. A
sender claims a message in one script, which counts the attempt and sets the due time to the end of
the sender's lease. Other senders do not see the message meanwhile; if this sender is killed, the
message becomes due again. A sender may record the result only while the attempt count is still the
one that it claimed. Times are those of the Redis server. The scripts build key names, so Redis
Cluster is not supported.
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
"""Largest number of webhook URLs of one job, over all callers that submitted the same decode."""

MESSAGE_TTL_S = 3 * 24 * 3600
"""How long a message is kept after its last attempt; longer than any interval between attempts."""
DEAD_TTL_S = 7 * 24 * 3600
"""How long dead letters are kept after the latest one."""
MAX_DEAD = 1000
"""Number of dead letters; older ones are dropped."""

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
    """An event for one URL, as claimed; `attempts` includes the current attempt."""

    id: str
    url: str
    body: str  # the same in every attempt
    job: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Outbox:
    """The outbox in the queue store."""

    store: Store

    def register(self, job_id: str, url: str, limit: int) -> bool:
        """Register a URL to notify when a job ends; False if `limit` others are registered."""
        key = self._registered(job_id)
        with self.store.queue.pipeline() as pipe:
            pipe.sadd(key, url)
            pipe.scard(key)
            pipe.expire(key, RECORD_TTL_S)
            added, count, _ = pipe.execute()
        if added and count > limit:
            self.store.queue.srem(key, url)
            return False
        return True

    def add(self, job_id: str, body: str, pipe: Pipeline | None) -> None:
        """Add a message, due now, for each registered URL, and forget these URLs."""
        (pipe or self.store.queue).eval(
            _MOVE, 2, self._registered(job_id), self.due,
            self.key(""), uuid.uuid4().hex[:16], body, job_id, MESSAGE_TTL_S,
        )  # fmt: skip

    def claim(self, lease_s: float) -> Message | None:
        """Claim the message that was due first, for `lease_s` seconds; None if none is due."""
        fields = self.store.queue.eval(_CLAIM, 1, self.due, self.key(""), lease_s)
        if not fields:
            return None
        name, url, body, job, attempts = (value.decode() for value in fields)
        return Message(name, url, body, job, int(attempts))

    def delivered(self, message: Message) -> bool:
        """Remove a delivered message; False if this sender has lost it to another."""
        return self._record(message, lambda pipe, _: self._remove(pipe, message))

    def retry_in(self, message: Message, seconds: float) -> bool:
        """Make the message due again in `seconds`; False if this sender has lost it."""

        def postpone(pipe: Pipeline, now: float) -> None:
            pipe.zadd(self.due, {message.id: now + seconds})
            pipe.expire(self.due, MESSAGE_TTL_S)
            pipe.expire(self.key(message.id), MESSAGE_TTL_S)

        return self._record(message, postpone)

    def give_up(self, message: Message, error: str) -> bool:
        """Move the message, with its last error, to the dead letters; False if it was lost."""

        def move(pipe: Pipeline, now: float) -> None:
            self._remove(pipe, message)
            pipe.lpush(self.dead, json.dumps({**asdict(message), "error": error, "at": now}))
            pipe.ltrim(self.dead, 0, MAX_DEAD - 1)
            pipe.expire(self.dead, DEAD_TTL_S)

        return self._record(message, move)

    def _remove(self, pipe: Pipeline, message: Message) -> None:
        pipe.delete(self.key(message.id))
        pipe.zrem(self.due, message.id)

    def _record(self, message: Message, change: Callable[[Pipeline, float], None]) -> bool:
        """Apply the result of an attempt; False, without effect, if another sender claimed it."""
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
        """Key of a message's hash."""
        return self.store.key("webhook", message_id)

    @property
    def due(self) -> str:
        """Key of a sorted set: message -> time at which it is due, or its sender's lease ends."""
        return self.store.key("webhooks")

    @property
    def dead(self) -> str:
        """Key of the list of dead letters, JSON, newest first."""
        return self.store.key("webhooks", "dead")

    def _registered(self, job_id: str) -> str:
        """Key of the set of URLs registered for the end of a job."""
        return self.store.key("webhooks", "of", job_id)


def register(store: Store, job_id: str, url: str) -> None:
    """Send one webhook to `url` when the job ends. Raises `ParameterError` beyond `MAX_URLS`."""
    if not Outbox(store).register(job_id, url, MAX_URLS):
        raise ParameterError(f"webhook: this decode has {MAX_URLS} webhooks already, the maximum")


def event(state: JobState) -> tuple[str, dict[str, Any]]:
    """Type and data of the webhook for an ended job."""
    picture = f"/v1/decodes/{state.id}/image" if state.status == "succeeded" else None
    decode = state.decode
    return f"decode.{state.status}", {
        "id": state.id, "status": state.status, "tier": decode.tier, "seed": decode.seed,
        "seed_text": str(decode.seed),  # JavaScript rounds numbers of 2^53 and more
        "width": decode.width, "height": decode.height, "image": picture,
        "error": state.error or None,
    }  # fmt: skip


def job_ended(
    store: Store, job_id: str, event_type: str, data: dict[str, Any], pipe: Pipeline | None = None
) -> None:
    """Add a message for each registered URL and forget these URLs: a second call adds nothing.

    With `pipe`, as part of that transaction.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"type": event_type, "timestamp": now, "data": data}
    Outbox(store).add(job_id, json.dumps(body, separators=(",", ":")), pipe)
