"""RQ's worker, restricted to one task, with a shutdown that lets short jobs finish.

A `SimpleWorker` does not fork per job: models are loaded once and may be on a CUDA device.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType

from redis import Redis
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer

from worker.context import WorkerContext
from worker.queue import urls, workers
from worker.queue.store import CONNECT_TIMEOUT_S, RedisError
from worker.rq_jobs import DecodeJob, LineQueue

log = logging.getLogger("afterimage.worker")

WORKER_TTL_S = 30
"""Expiry of RQ's record of an idle worker."""
SAME_SIGNAL_S = 2.0
"""Signals within this time after the first one do not count as a second signal."""
RETRY_S = 1.0
"""Pause before another try to reach the queue."""
SHUTDOWN_SIGNALS = signal.SIGTERM, signal.SIGINT


class DecodeWorker(SimpleWorker):
    """Runs deferred actions after each job, and handles SIGTERM and SIGINT.

    On the first signal an idle worker exits at once. A running job is finished if that takes at
    most `grace_s`, and put back otherwise. A second signal puts it back immediately.
    """

    working = busy = False
    timer: threading.Timer | None = None

    def __init__(self, context: WorkerContext, connection: Redis) -> None:
        super().__init__(
            [LineQueue(context.jobs.line, connection, workers.key(context.jobs))],
            connection=connection,
            worker_ttl=WORKER_TTL_S,
            job_class=DecodeJob,
            queue_class=LineQueue,
            serializer=JSONSerializer,
        )
        self.context = context
        self.log_job_description = False
        self.max_connection_wait_time = RETRY_S

    def run(self) -> None:
        """Run jobs until a shutdown. Raises `RedisError` or `StopRequested`."""
        self.working = True
        try:
            self.work(logging_level="WARNING")
        finally:
            self.working = False
            if self.timer is not None:
                self.timer.cancel()

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run a job, then the actions that had to wait until RQ has released it."""
        self.busy = True
        try:
            super().execute_job(job, queue)
        finally:
            self.context.run_deferred()
            self.busy = False
        self._stop_requested = self.context.stopping

    def teardown(self) -> None:
        """Stop RQ's pub/sub thread first: RQ itself would leave it running if the queue is down."""
        self.working = False
        if self.pubsub_thread:
            self.pubsub_thread.stop()
        super().teardown()  # type: ignore[no-untyped-call]

    def _install_signal_handlers(self) -> None:
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, self._shut_down)
        self._stop_requested = self.context.stopping  # a signal may have come earlier

    def _shut_down(self, _number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self._stop_requested = True
        first = self.context.signaled_at = self.context.signaled_at or time.monotonic()
        repeated = time.monotonic() - first > SAME_SIGNAL_S
        self.context.stopping = True
        if not self.busy:
            if self.working:
                raise StopRequested
            return
        remaining = self.context.interrupt(-1.0 if repeated else self.context.grace_s)
        if remaining is not None and self.timer is None:
            log.info("shutting down once the job is done, in about %.1f s", remaining)
            self._start_timer()

    def _start_timer(self) -> None:
        """Send SIGTERM to this process again when the grace period is over."""
        seconds = max(self.context.grace_s, SAME_SIGNAL_S + 0.1)
        self.timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        self.timer.daemon = True
        self.timer.start()


def serve(context: WorkerContext, redis_url: str) -> None:
    """Run jobs until SIGTERM or SIGINT; reconnects whenever Redis fails.

    RQ gets a connection of its own, since it sets read timeouts for its blocking reads.
    """
    connection = urls.client(redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S)
    while not context.stopping:
        with contextlib.suppress(RedisError, StopRequested):
            DecodeWorker(context, connection).run()
        if not context.stopping:
            log.warning("the queue is down; reconnecting")
            time.sleep(RETRY_S)
