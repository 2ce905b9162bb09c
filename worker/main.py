"""A worker process: `afterimage worker`, or `python -P -m worker.main`."""

import gc
import hashlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from models.errors import AfterimageError
from worker.settings import WorkerSettings, prepare_process, without_garbage_collection
from worker.telemetry import logs, tracing

if TYPE_CHECKING:
    from worker.context import WorkerContext
    from worker.deliveries import Deliveries

log = logging.getLogger("afterimage.worker")

UNHEALTHY = 3
"""Exit status after memory ran out or the device failed: the supervisor should restart it."""
CUDA_BATCH = 8
"""Default batch size on CUDA."""


def main() -> int:
    """Load the models, then run jobs until SIGTERM or SIGINT; return the exit status.

    On a signal the running job is finished if that takes at most `grace_s` seconds. Otherwise it is
    put back into the queue.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # PID 1 of a container has no default handlers
        signal.signal(number, _exit)
    logs.setup("INFO")
    tracing.setup("afterimage-worker")
    settings = WorkerSettings()
    if not settings.redis_url:
        return logs.complain("set REDIS_URL: a worker needs a queue", 2)
    try:
        prepare_process(settings)
    except (AfterimageError, OSError) as e:
        return logs.complain(f"the worker cannot start: {e}", 1)
    os.nice(settings.nice)
    with without_garbage_collection():
        from worker.queue.store import RedisError

        try:
            worker, deliveries = _load(settings)
        except (RedisError, AfterimageError) as e:
            return logs.complain(f"the worker cannot start: {e}", 1)
        worker.library.warm_up()
    return _serve(worker, deliveries, settings.redis_url)


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    """Exit at once, without an exception that the interrupted code could catch: no job runs yet."""
    os._exit(0)


def _load(settings: WorkerSettings) -> tuple["WorkerContext", "Deliveries"]:
    """Connect to Redis and load the models. Raises `RedisError` or `AfterimageError`."""
    from worker.queue import object_stores, results, store

    objects = object_stores.connect(settings)
    connected = store.connect(settings, results.connect(settings, objects))
    connected.check()  # before the models, which take seconds to load

    from models import library
    from worker import context
    from worker.deliveries import Deliveries
    from worker.heartbeat import Heartbeat
    from worker.queue.jobs import Jobs
    from worker.spool import Spool

    loaded = library.load(settings.threads, folder=settings.weights_dir)
    jobs = Jobs(connected, settings.job_timeout_s)
    device = loaded.device.type
    stores = f"{settings.prefix} {settings.redis_url}"  # queues may share a folder
    spools = settings.cache_dir / "spool"
    Spool.remove_expired(spools)
    spool = Spool(spools / hashlib.sha256(stores.encode()).hexdigest()[:16])
    worker = context.WorkerContext(
        jobs=jobs,
        library=loaded,
        heartbeat=Heartbeat(jobs, spool, settings.cache_dir / "alive", device),
        spool=spool,
        max_pixels=settings.max_pixels,
        batch=settings.batch or (CUDA_BATCH if device == "cuda" else 1),
        grace_s=settings.grace_s,
    )
    context.install(worker)
    return worker, Deliveries(jobs, objects, settings.max_pixels, loaded)


def _serve(worker: "WorkerContext", deliveries: "Deliveries", redis_url: str) -> int:
    """Send heartbeats, run jobs and write targets until a signal; returns the exit status."""
    from worker.rq_worker import serve

    worker.heartbeat.start()
    deliveries.start()
    log.info("ready: queue %s, device %s", worker.jobs.queue.name, worker.library.device.type)
    serve(worker, redis_url)
    healthy = not worker.stopping or worker.signaled_at is not None
    deliveries.stop()
    worker.heartbeat.stopped.set()
    worker.heartbeat.join()
    if worker.jobs.store.results is not None:
        worker.jobs.store.results.close()
    return 0 if healthy else UNHEALTHY


if __name__ == "__main__":
    status = main()
    gc.freeze()  # otherwise the last collection at exit takes seconds, or minutes on a busy machine
    sys.exit(status)
