"""How much a caller may ask for: requests in a minute, and jobs that have not ended.

Counted in Redis, for all API processes together. Headers: draft-ietf-httpapi-ratelimit-headers-10.
"""

import logging
import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from service import metrics
from service.auth import Caller
from service.problems import RETRY_S, TooManyRequests
from worker.queue import estimates
from worker.queue.jobs import Jobs
from worker.queue.records import ENDED, JobState
from worker.queue.store import RedisError

WINDOW_S = 60
JOB_TTL_S = 24 * 3600
"""How long a job counts that never ends: as long as a picture may be wanted."""
SUBMIT_S = 60
"""How old an entry must be to go with a record that ended before, or that is missing: the job was
submitted by then, and hosts' clocks differ by less."""
PAUSE_S = 5.0
"""How long requests are not counted after Redis was away: each would wait for its silence."""
TELL_S = 60.0
"""How often that is told."""

_REMEMBER = """
redis.call('zremrangebyscore', KEYS[1], '-inf', ARGV[2])
local known = redis.call('zscore', KEYS[1], ARGV[1])
if not known and redis.call('zcard', KEYS[1]) >= tonumber(ARGV[4]) then return 0 end
redis.call('zadd', KEYS[1], ARGV[2] + ARGV[3], ARGV[1])
redis.call('expire', KEYS[1], ARGV[3])
return 1
"""

log = logging.getLogger(__name__)


class Quotas:
    """Limits of callers; `requests_per_minute` and `jobs_at_once` hold for those without their own.

    None is no limit.
    """

    def __init__(
        self, jobs: Jobs, requests_per_minute: int | None = None, jobs_at_once: int | None = None
    ) -> None:
        self.jobs = jobs
        self.requests_per_minute = requests_per_minute
        self.jobs_at_once = jobs_at_once
        queue = jobs.store.queue
        storage = RedisStorage("redis://", queue.connection_pool, jobs.store.key("quota"))
        self._window = MovingWindowRateLimiter(storage)
        self._remember = queue.register_script(_REMEMBER)
        self._uncounted_until = 0.0  # monotonic; 0 while Redis answers
        self._told = -math.inf

    def counts(self, caller: Caller) -> bool:
        """Whether the caller's requests are limited at all."""
        return self._limit(caller) is not None

    def request(self, caller: Caller) -> dict[str, str]:
        """Count a request; the headers `RateLimit` and `RateLimit-Policy`, where there is a limit.

        Raises `TooManyRequests`. While Redis is away, nothing is counted and all may pass.
        """
        limit = self._limit(caller)
        now = time.monotonic()
        if limit is None or now < self._uncounted_until:
            return {}
        if self._uncounted_until:  # this request finds out; the others go on meanwhile
            self._uncounted_until = now + PAUSE_S
        try:
            passes, left, reset_s = self._count(caller.name, limit)
        except RedisError as e:
            self._away(e)
            return {}
        self._uncounted_until = 0.0
        headers = _headers("requests", f"{limit};w={WINDOW_S}", left, reset_s)
        if not passes:
            retry = {"Retry-After": str(1 if left else reset_s)}
            metrics.rate_limited()
            raise TooManyRequests(f"{limit} requests in {WINDOW_S} s", headers | retry)
        return headers

    def job(self, caller: Caller, job_id: str) -> None:
        """Remember, before it is submitted, that a job is the caller's.

        Raises `TooManyRequests` where it has `jobs_at_once` others that have not ended, and
        `RedisError`.
        """
        limit = caller.jobs_at_once or self.jobs_at_once
        if limit is None or self._remembered(caller, job_id, limit):
            return
        unfinished = self._unfinished(caller)
        if self._remembered(caller, job_id, limit):
            return
        times = (estimates.eta_s(self.jobs, state) for state in unfinished)
        wait_s = max(math.ceil(min((t for t in times if t is not None), default=RETRY_S)), 1)
        headers = {**_headers("jobs", str(limit), 0, wait_s), "Retry-After": str(wait_s)}
        metrics.rate_limited()
        raise TooManyRequests(f"{limit} jobs that have not ended", headers)

    def ended(self, caller: Caller, job_id: str) -> None:
        """The job no longer counts, as when the caller withdraws; its end is seen without this."""
        self.jobs.store.queue.zrem(self._key(caller), job_id)

    def _limit(self, caller: Caller) -> int | None:
        return caller.requests_per_minute or self.requests_per_minute

    def _count(self, name: str, limit: int) -> tuple[bool, int, int]:
        """Whether one more passes, how many may follow, and seconds until one more may."""
        item = RateLimitItemPerMinute(limit, namespace="requests")
        passes = self._window.hit(item, name)
        reset, left = self._window.get_window_stats(item, name)
        wait_s = math.floor(reset - time.time()) + 1  # later than that moment
        return passes, left, min(max(wait_s, 1), WINDOW_S)

    def _away(self, e: RedisError) -> None:
        now = time.monotonic()
        self._uncounted_until = now + PAUSE_S
        if now - self._told >= TELL_S:
            self._told = now
            log.warning("requests are not counted, Redis is away: %s", e)

    def _remembered(self, caller: Caller, job_id: str, limit: int) -> bool:
        arguments = (job_id, time.time(), JOB_TTL_S, limit)
        return bool(self._remember(keys=[self._key(caller)], args=arguments))

    def _unfinished(self, caller: Caller) -> list[JobState]:
        """The caller's jobs; those that ended, by their records, are forgotten."""
        queue, key, found = self.jobs.store.queue, self._key(caller), []
        entries: list[tuple[bytes, float]] = queue.zrange(key, 0, -1, withscores=True)  # type: ignore[assignment]
        for value, until in entries:
            state, since = self.jobs.record(value.decode()), until - JOB_TTL_S
            if state and state.status not in ENDED:
                found.append(state)
            elif time.time() - since > SUBMIT_S or (state and state.ended >= since):
                queue.zrem(key, value)
        return found

    def _key(self, caller: Caller) -> str:
        """Sorted set: job -> until when it counts at most."""
        return self.jobs.store.key("jobs-of", caller.name)


def _headers(name: str, policy: str, left: int, reset_s: int) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"{name}";q={policy}',
        "RateLimit": f'"{name}";r={left};t={reset_s}',
    }
