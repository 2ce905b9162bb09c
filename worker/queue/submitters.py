"""Which callers submitted a job. Private services show it only to them.

Unlike a subscription, a submission is not undone, and it outlasts the job's record.
"""

from redis.client import Pipeline

from worker.queue.store import SUBMITTERS_TTL_S, Store


def add(store: Store, job_id: str, caller: str) -> None:
    """Record that the caller has submitted the job."""
    with store.queue.pipeline() as pipe:
        pipe.sadd(_key(store, job_id), caller)
        keep(store, job_id, pipe)
        pipe.execute()


def keep(store: Store, job_id: str, pipe: Pipeline) -> None:
    """Let the record of submitters expire `SUBMITTERS_TTL_S` from now, as part of `pipe`."""
    pipe.expire(_key(store, job_id), SUBMITTERS_TTL_S)


def contains(store: Store, job_id: str, caller: str) -> bool:
    """True if the caller has submitted the job."""
    return bool(store.queue.sismember(_key(store, job_id), caller))


def _key(store: Store, job_id: str) -> str:
    return store.key("submitters", job_id)
