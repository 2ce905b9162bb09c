"""What RQ's worker takes and runs: the next job of all callers, restricted to one task."""

import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from redis import Redis
from rq import Queue
from rq.exceptions import DequeueTimeout, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from worker import tasks
from worker.queue.line import Line
from worker.queue.rq_queue import TASK

MAX_WAIT_S = 3
"""How long a worker waits to be woken before it looks for jobs by itself."""


class DecodeJob(Job):
    """A job that runs only `enhance` and no callbacks, whatever functions its Redis hash names."""

    @property
    def func(self) -> Callable[[str], None]:
        """The task; raises `ValueError` for a job that names another function."""
        if self.func_name != TASK:
            raise ValueError(f"the job names the function {self.func_name}; only {TASK} is allowed")
        return tasks.enhance

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None


class LineQueue(Queue):
    """Stands for the queues of all callers: takes jobs in the order of `worker.queue.line`.

    The jobs that it returns belong to this queue, so that RQ's registries of running and failed
    jobs do not depend on callers.
    """

    def __init__(self, line: Line, connection: Redis, worker: str) -> None:
        super().__init__(line.base.name, connection=connection, serializer=JSONSerializer)
        self.line, self.worker = line, worker

    @classmethod
    def dequeue_any(
        cls, queues: Iterable[Queue], timeout: int | None, *args: Any, **kwargs: Any
    ) -> tuple[Job, Queue] | None:
        """The next job and this queue; None without `timeout` if no job waits.

        Raises `DequeueTimeout` after `timeout` seconds or earlier.
        """
        (queue,) = queues
        return cast(LineQueue, queue)._dequeue(timeout)

    def _dequeue(self, timeout: int | None) -> tuple[Job, Queue] | None:
        while True:
            taken = self.line.take(self.connection, self.worker)
            if isinstance(taken, tuple):
                try:
                    job = DecodeJob.fetch(taken[1], self.connection, self.serializer)
                except NoSuchJobError:
                    continue
                job.origin = self.name
                return job, self
            if timeout is None:
                return None
            wait_s = min(timeout, MAX_WAIT_S)
            if taken is not None:  # drained: waiting would take a wake-up call from another worker
                time.sleep(wait_s)
            elif self.line.wait(self.connection, wait_s):
                continue
            raise DequeueTimeout(wait_s, [self.name])
