"""Decodes whose record has expired, but whose picture is still in an object store."""

import time
from dataclasses import replace

import redis

from worker.queue.jobs import Jobs
from worker.queue.records import DecodeRequest, JobState
from worker.queue.store import RECORD_TTL_S


def find_or_restore(jobs: Jobs, decode: DecodeRequest) -> JobState | None:
    """Return the job's state; make a new record if only the picture is left, in the results."""
    state = jobs.get(decode.id)
    if state is None and jobs.store.recall(decode.id) is not None:
        return record(jobs, decode)
    return state


def record(jobs: Jobs, decode: DecodeRequest) -> JobState:
    """The job's state; a job without a record, or one that failed, gets a record of success."""
    key, now = jobs.key(decode.id), time.time()
    made = replace(
        JobState.queued(decode), status="succeeded", step=decode.settings.steps, started=now,
        ended=now,
    )  # fmt: skip
    while True:
        with jobs.store.queue.pipeline() as pipe:
            try:
                pipe.watch(key)  # type: ignore[no-untyped-call]
                state = jobs.record(decode.id)
                if state is not None and state.status not in {"failed", "canceled"}:
                    return state
                pipe.multi()
                pipe.delete(key)
                pipe.hset(key, mapping=made.new_record())
                pipe.expire(key, RECORD_TTL_S)
                pipe.execute()
                return made
            except redis.WatchError:
                continue
