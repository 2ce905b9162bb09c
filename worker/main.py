"""A worker process: `afterimage worker`, or `python -P -m worker.main`.

RQ's `SimpleWorker`: it does not fork, so that the models are loaded once, stay warm and may live on
a CUDA device. A thread of ours, the keeper, has the lease that RQ's own recovery (minutes) lacks.
"""

import contextlib
import gc
import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from worker.settings import WorkerSettings, prepare_process, without_collections
from worker.telemetry import logs, tracing

log = logging.getLogger("afterimage.worker")

TTL_S = 30
"""How long RQ's own note of an idle worker lasts; its reads wait for half of that."""
REPEAT_S = 2.0
"""Signals that follow the first so closely mean the same: several end a service together."""
RETRY_S = 1.0
"""Between two tries to reach the queue."""
_ENDS = signal.SIGTERM, signal.SIGINT
UNHEALTHY = 3
"""Exit status after which the process should be started again: it ran out of memory."""


def main() -> int:
    """Load the models, then run jobs until SIGTERM or SIGINT.

    A running job is then finished where that takes `grace_s` at most, else left to others.
    """
    for number in _ENDS:  # as a container's first process it would not end by itself
        signal.signal(number, _leave)
    logs.setup("INFO")
    tracing.setup("afterimage-worker")
    settings = WorkerSettings()
    if not settings.redis_url:
        print("a worker needs REDIS_URL, the queue that it serves", file=sys.stderr)  # noqa: T201
        return 2
    prepare_process(settings)
    os.nice(settings.nice)

    with without_collections():
        from models.errors import AfterimageError
        from worker.queue import store

        try:
            connected = store.connect(settings)
            connected.check()

            from models import library
            from worker.heartbeat import Keeper
            from worker.queue.jobs import Jobs
            from worker.spool import Spool
            from worker.tasks import Context

            Context.library = library.load(settings.threads, folder=settings.weights_dir)
        except (store.RedisError, AfterimageError) as e:
            print(f"the worker cannot start: {e}", file=sys.stderr)  # noqa: T201
            return 1
        Context.library.warm_up()
    device = Context.library.diffusion.device.type
    Context.batch = settings.batch or (8 if device == "cuda" else 1)
    Context.max_pixels, Context.grace_s = settings.max_pixels, settings.grace_s
    Context.jobs = Jobs(connected, settings.job_timeout_s)
    stores = f"{settings.prefix} {settings.redis_url}"
    own = hashlib.sha256(stores.encode()).hexdigest()[:16]  # others may share the folder
    spools = settings.cache_dir / "spool"
    Spool.forget(spools)
    Context.spool = Spool(spools / own)
    Context.keeper = Keeper(Context.jobs, Context.spool, settings.cache_dir / "alive")
    Context.keeper.start()
    log.info("ready: %s on %s", Context.jobs.queue.name, device)
    serve(settings.redis_url)
    unhealthy = Context.stopping and Context.asked is None
    Context.keeper.stopped.set()
    Context.keeper.join()
    return UNHEALTHY if unhealthy else 0


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """Nothing was begun yet. An exception could be lost in whatever the signal interrupts."""
    os._exit(0)


def serve(redis_url: str) -> None:
    """Run jobs until the process is asked to end, whatever becomes of Redis meanwhile.

    RQ waits for jobs on connections of its own: it makes their timeouts longer than its reads.
    """
    from rq import Queue, SimpleWorker
    from rq.exceptions import StopRequested
    from rq.job import Job
    from rq.serializers import JSONSerializer

    from worker import tasks
    from worker.queue import urls
    from worker.queue.jobs import TASK
    from worker.queue.store import CONNECT_S, RedisError
    from worker.tasks import Context

    class DecodeJob(Job):
        """A job that runs nothing but the one task, and no callbacks, whatever its record names."""

        @property
        def func(self) -> Callable[[str], None]:
            if self.func_name != TASK:
                raise ValueError(f"only {TASK} is run, not {self.func_name}")
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

    class DecodeWorker(SimpleWorker):
        """Ends as `main` says, and settles what must wait until RQ is done with a job."""

        working = busy = False
        timer: threading.Timer | None = None

        def execute_job(self, job: Job, queue: Queue) -> None:
            self.busy = True
            try:
                super().execute_job(job, queue)
            finally:
                tasks.settle()
                self.busy = False
            self._stop_requested = Context.stopping

        def teardown(self) -> None:
            self.working = False
            if self.pubsub_thread:  # RQ's own way comes here only where the queue can be reached
                self.pubsub_thread.stop()
            super().teardown()  # type: ignore[no-untyped-call]

        def _install_signal_handlers(self) -> None:
            for number in _ENDS:
                signal.signal(number, self._end)
            self._stop_requested = Context.stopping  # it may have been told to another before

        def _end(self, _number: int, _frame: FrameType | None) -> None:
            self._stop_requested = True
            first = Context.asked = Context.asked or time.monotonic()
            again = time.monotonic() - first > REPEAT_S
            Context.stopping = True
            if not self.busy:
                if self.working:
                    raise StopRequested
                return
            left = tasks.left_s()
            if not Context.interruptible:
                return
            if again or left is None or left > Context.grace_s:
                raise tasks.ShutdownRequested
            if self.timer is None:
                log.info("ending once the job is done, in about %.1f s", left)
                end = max(Context.grace_s, REPEAT_S + 0.1), os.kill, (os.getpid(), signal.SIGTERM)
                self.timer = threading.Timer(*end)
                self.timer.daemon = True
                self.timer.start()

    queue = urls.client(redis_url, socket_connect_timeout=CONNECT_S)
    while not Context.stopping:
        with contextlib.suppress(RedisError, StopRequested):
            worker = DecodeWorker(  # no fork per job: this process keeps its models
                [Context.jobs.queue.name],
                connection=queue,
                worker_ttl=TTL_S,
                job_class=DecodeJob,
                serializer=JSONSerializer,
            )
            worker.log_job_description = False
            worker.max_connection_wait_time = RETRY_S
            worker.working = True
            try:
                worker.work(logging_level="WARNING")
            finally:
                worker.working = False
                if worker.timer is not None:
                    worker.timer.cancel()
        if not Context.stopping:
            log.warning("the queue went away; trying again")
            time.sleep(RETRY_S)


if __name__ == "__main__":
    status = main()
    gc.freeze()  # the interpreter's last collection would take seconds, or minutes where it is busy
    sys.exit(status)
