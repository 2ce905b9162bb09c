"""`afterimage serve` and `afterimage worker`."""

import argparse
import contextlib
import gc
import os
import signal
from types import FrameType
from typing import Any

from service.cli.supervisor import COURIER, WORKER, running
from service.cli.terminal import complain, say
from service.settings import ServiceSettings
from worker.settings import without_garbage_collection

STALLED_S = 10
"""How long requests may take to finish when the service stops."""


def add(commands: Any) -> None:
    """Add the commands `serve` and `worker`."""
    serve = commands.add_parser("serve", help="run the HTTP API with its workers")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--workers", type=int, default=1, help="worker processes (default 1)")
    _stores(serve, "else a private server")
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="run one worker over an existing Redis")
    _stores(worker, "which must be set")
    worker.set_defaults(run=_worker)


def _stores(command: argparse.ArgumentParser, otherwise: str) -> None:
    command.add_argument("--redis-url", help=f"the queue; default REDIS_URL, {otherwise}")
    command.add_argument(
        "--cache-redis-url", help="the pictures; default CACHE_REDIS_URL, else with the queue"
    )


def _set_stores(args: argparse.Namespace) -> None:
    for name, url in (("REDIS_URL", args.redis_url), ("CACHE_REDIS_URL", args.cache_redis_url)):
        if url:
            os.environ[name] = url


def _serve(args: argparse.Namespace) -> int:
    if args.workers < 0:
        return complain("--workers must be 0 or more")
    _set_stores(args)
    settings = ServiceSettings()

    from worker.queue import private_redis, store
    from worker.telemetry import logs, tracing
    from worker.webhooks.settings import WebhookSettings

    if settings.redis_url:
        connected = store.connect(settings)  # what is wrong with it is told at once
        with contextlib.suppress(store.RedisError):  # that it is away is not
            connected.check()
        connected.close()
    loading = contextlib.ExitStack()
    loading.enter_context(without_garbage_collection())

    import uvicorn

    from service.app import create_app  # before the workers start, who would be in its way

    logs.setup("INFO")
    tracing.setup("afterimage-api")
    signal.signal(signal.SIGTERM, _exit)  # so that everything started here is stopped

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):  # type: ignore[no-untyped-def]
            await super().startup(sockets)
            loading.close()
            if not self.should_exit:
                say(f"Afterimage is ready at http://{args.host}:{args.port}  (Ctrl-C stops it)")

        async def shutdown(self, sockets=None):  # type: ignore[no-untyped-def]
            app.state.services.closing.set()
            await super().shutdown(sockets)

    with contextlib.ExitStack() as stack:
        if not settings.redis_url:
            say("no REDIS_URL: starting a private Redis")
            queue, cache = stack.enter_context(private_redis.servers(settings.cache_dir))
            os.environ["REDIS_URL"] = queue
            os.environ.setdefault("CACHE_REDIS_URL", cache)
        courier = [COURIER] if WebhookSettings().secrets else []
        stack.enter_context(running([WORKER] * args.workers + courier, settings.grace_s))
        say("loading models")
        os.environ.setdefault("AFTERIMAGE_METRICS_HOST", args.host)
        app = create_app(ServiceSettings())
        config = uvicorn.Config(
            app,
            args.host,
            args.port,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=STALLED_S,
        )
        server = Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    gc.freeze()  # as in the worker
    return 0 if server.started else 1


def _worker(args: argparse.Namespace) -> int:
    _set_stores(args)
    os.execv(WORKER[0], WORKER)


def _exit(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
