"""Quotas of a caller: requests per minute, and jobs that have not ended.

The counts are kept in Redis, which all API processes share.
Headers: draft-ietf-httpapi-ratelimit-headers-10.
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
"""How long a job that does not end is counted: as long as the longest subscription."""
SUBMIT_S = 60
"""How long an entry is kept although its job has no record, or only that of an earlier run.

An entry is written shortly before its job is submitted. After this time, which also allows for
hosts whose clocks differ, the submission must have failed, and the entry is removed."""
PAUSE_S = 5.0
"""How long requests are not counted after a Redis error, so that not every request waits for a
timeout."""
WARN_S = 60.0
"""Minimum seconds between two log lines about a Redis error."""

_ADD_JOB = """
redis.call('zremrangebyscore', KEYS[1], '-inf', ARGV[2])
local known = redis.call('zscore', KEYS[1], ARGV[1])
if not known and redis.call('zcard', KEYS[1]) >= tonumber(ARGV[4]) then return 0 end
redis.call('zadd', KEYS[1], ARGV[2] + ARGV[3], ARGV[1])
redis.call('expire', KEYS[1], ARGV[3])
return 1
"""

log = logging.getLogger(__name__)


class Quotas:
    """Counts requests and jobs against the limits of their callers.

    `requests_per_minute` and `jobs_at_once` are the limits of callers whose key sets none; None
    means no limit.
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
        self._add_job = queue.register_script(_ADD_JOB)
        self._paused_until = 0.0  # monotonic; 0 while Redis responds
        self._warned_at = -math.inf

    def limits_requests(self, caller: Caller) -> bool:
        """Whether the caller's requests are limited at all."""
        return self._limit(caller) is not None

    def request(self, caller: Caller) -> dict[str, str]:
        """Count a request; return the headers `RateLimit` and `RateLimit-Policy`, or none.

        Raises `TooManyRequests`. While Redis is unavailable, nothing is counted or refused.
        """
        limit = self._limit(caller)
        now = time.monotonic()
        if limit is None or now < self._paused_until:
            return {}
        if self._paused_until:  # only this request tries Redis again; others skip it meanwhile
            self._paused_until = now + PAUSE_S
        try:
            allowed, left, reset_s = self._count(caller.name, limit)
        except RedisError as e:
            self._pause(e)
            return {}
        self._paused_until = 0.0
        headers = _headers("requests", f"{limit};w={WINDOW_S}", left, reset_s)
        if not allowed:
            retry = {"Retry-After": str(1 if left else reset_s)}
            metrics.rate_limited()
            message = (
                f"the quota of {limit} requests in {WINDOW_S} s is used up; "
                f"try again in {retry['Retry-After']} s"
            )
            raise TooManyRequests(message, headers | retry)
        return headers

    def job(self, caller: Caller, job_id: str) -> None:
        """Count a job, before it is submitted, against the caller's `jobs_at_once`.

        Raises `TooManyRequests` if that many other jobs of the caller have not ended, and
        `RedisError`.
        """
        limit = caller.jobs_at_once or self.jobs_at_once
        if limit is None or self._try_add(caller, job_id, limit):
            return
        unfinished = self._unfinished(caller)
        if self._try_add(caller, job_id, limit):
            return
        running = [state for state in unfinished if state.status == "running"]
        first = sorted((s for s in unfinished if s.status == "queued"), key=lambda s: s.created)[:1]
        times = (estimates.eta_s(self.jobs, state) for state in (*running, *first))
        wait_s = max(math.ceil(min((t for t in times if t is not None), default=RETRY_S)), 1)
        headers = {**_headers("jobs", str(limit), 0, wait_s), "Retry-After": str(wait_s)}
        metrics.rate_limited()
        message = f"{limit} of your jobs have not ended, which is the quota; wait for one of them"
        raise TooManyRequests(message, headers)

    def free_jobs(self, caller: Caller) -> int | None:
        """How many more jobs the caller may have now; None without a limit."""
        limit = caller.jobs_at_once or self.jobs_at_once
        return None if limit is None else max(limit - len(self._unfinished(caller)), 0)

    def release_job(self, caller: Caller, job_id: str) -> None:
        """Stop counting a job that the caller has withdrawn. Jobs that end are removed by `job`."""
        self.jobs.store.queue.zrem(self._key(caller), job_id)

    def _limit(self, caller: Caller) -> int | None:
        return caller.requests_per_minute or self.requests_per_minute

    def _count(self, name: str, limit: int) -> tuple[bool, int, int]:
        """Count a request. Return whether it is allowed, how many more are allowed now, and
        the seconds until one more will be allowed."""
        item = RateLimitItemPerMinute(limit, namespace="requests")
        allowed = self._window.hit(item, name)
        reset, left = self._window.get_window_stats(item, name)
        wait_s = math.floor(reset - time.time()) + 1  # later than `reset`
        return allowed, left, min(max(wait_s, 1), WINDOW_S)

    def _pause(self, e: RedisError) -> None:
        """Stop counting for `PAUSE_S`, and log the error."""
        now = time.monotonic()
        self._paused_until = now + PAUSE_S
        if now - self._warned_at >= WARN_S:
            self._warned_at = now
            log.warning("requests are not counted while Redis is unavailable: %s", e)

    def _try_add(self, caller: Caller, job_id: str, limit: int) -> bool:
        """Add a job to the caller's jobs; returns False if the caller has `limit` other jobs."""
        arguments = (job_id, time.time(), JOB_TTL_S, limit)
        return bool(self._add_job(keys=[self._key(caller)], args=arguments))

    def _unfinished(self, caller: Caller) -> list[JobState]:
        """The caller's unfinished jobs; removes the entries of ended ones."""
        queue, key, unfinished = self.jobs.store.queue, self._key(caller), []
        entries: list[tuple[bytes, float]] = queue.zrange(key, 0, -1, withscores=True)  # type: ignore[assignment]
        for value, until in entries:
            state, added = self.jobs.record(value.decode()), until - JOB_TTL_S
            if state and state.status not in ENDED:
                unfinished.append(state)
            elif time.time() - added > SUBMIT_S or (state and state.ended >= added):
                queue.zrem(key, value)
        return unfinished

    def _key(self, caller: Caller) -> str:
        """Redis key of a sorted set: job id -> time at which the entry expires."""
        return self.jobs.store.key("jobs-of", caller.name)


def _headers(name: str, policy: str, left: int, reset_s: int) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"{name}";q={policy}',
        "RateLimit": f'"{name}";r={left};t={reset_s}',
    }
