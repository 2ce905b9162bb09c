"""RQ's queues of decode jobs.

RQ keeps a list of job ids per queue, and a hash per job that names the function to call. What the
project itself knows about a job is in `worker.queue.jobs`, under keys of its own.
"""

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

TASK = "worker.tasks.enhance"
"""The only function that workers call; its name is stored in queued jobs."""
FAILURE_TTL_S = 60
"""How long RQ keeps its own hash of a job that raised an exception."""


class DecodeQueue(Queue):
    """A FIFO queue of the ids of one caller's jobs.

    Methods that take a pipeline become part of its transaction.
    """

    def __init__(self, name: str, connection: Redis, timeout_s: int) -> None:
        super().__init__(name, connection=connection, serializer=JSONSerializer)
        self.timeout_s = timeout_s

    def add(self, job_id: str, pipe: Pipeline, at_front: bool = False) -> None:
        """Queue a call of `TASK` with this job id."""
        pipe.delete(Job.key_for(job_id))  # otherwise the expiry set by a former failure remains
        self.enqueue_call(
            TASK,
            args=(job_id,),
            job_id=job_id,
            timeout=self.timeout_s,
            result_ttl=0,
            failure_ttl=FAILURE_TTL_S,
            description=job_id,
            at_front=at_front,
            pipeline=pipe,
        )

    def discard(self, job_id: str, pipe: Pipeline) -> None:
        """Remove a job from the queue and delete RQ's hash of it."""
        pipe.lrem(self.key, 0, job_id)
        pipe.delete(Job.key_for(job_id))

    def position(self, job_id: str) -> int | None:
        """Number of jobs ahead in the queue; None for a job that is not in it."""
        index: int | None = self.connection.lpos(self.key, job_id)  # type: ignore[assignment]
        return index
