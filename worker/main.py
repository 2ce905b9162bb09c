"""A worker process: `afterimage worker`, or `python -P -m worker.main`."""

import logging
import sys
from collections.abc import Callable

from worker import logs, tracing
from worker.settings import WorkerSettings, prepare_process

log = logging.getLogger("afterimage.worker")


def main() -> int:
    """Load the models, then run jobs until SIGTERM or SIGINT; a running job is finished first."""
    logs.setup("INFO")
    tracing.setup("afterimage-worker")
    settings = WorkerSettings()
    if not settings.redis_url:
        print("a worker needs REDIS_URL, the queue that it serves", file=sys.stderr)  # noqa: T201
        return 2
    prepare_process(settings)

    from rq import SimpleWorker
    from rq.job import Job
    from rq.serializers import JSONSerializer

    from models import library
    from models.errors import AfterimageError
    from worker import store, tasks
    from worker.jobs import TASK, Jobs

    try:
        connected = store.connect(settings)
        connected.ping()
        tasks.Context.library = library.load(settings.threads, folder=settings.weights_dir)
    except (store.RedisError, AfterimageError) as e:
        print(f"the worker cannot start: {e}", file=sys.stderr)  # noqa: T201
        return 1
    tasks.Context.library.warm_up()
    tasks.Context.max_pixels = settings.max_pixels
    tasks.Context.jobs = Jobs(connected, settings.job_timeout_s)
    tasks.Context.keeper = tasks.Keeper(tasks.Context.jobs)
    tasks.Context.keeper.start()

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

    log.info("ready: %s", tasks.Context.jobs.queue.name)
    worker = SimpleWorker(  # no fork per job: this process keeps its models
        [tasks.Context.jobs.queue.name],
        connection=connected.queue,
        job_class=DecodeJob,
        serializer=JSONSerializer,
    )
    worker.log_job_description = False
    worker.work(logging_level="WARNING")
    return 0


if __name__ == "__main__":
    sys.exit(main())
