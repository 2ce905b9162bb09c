"""`afterimage serve` and `afterimage worker`."""

import argparse
import contextlib
import gc
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

from service.cli import connections, listening, options
from service.cli.supervisor import WEBHOOK_SENDER, WORKER, Supervisor
from service.cli.terminal import complain, say
from service.settings import ServiceSettings
from worker.settings import without_garbage_collection


def add(commands: Any) -> None:
    """Add `serve` and `worker` to the parser's commands."""
    serve = commands.add_parser("serve", help="run the HTTP API and its workers")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    serve.add_argument(
        "--port", type=int, default=8000, help="port to bind; 0: any free one (default: 8000)"
    )
    serve.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    options.add_stores(serve, "a private Redis is started")
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="run one worker that uses an existing Redis")
    options.add_stores(worker, "the worker does not start")
    worker.set_defaults(run=_worker)


def _serve(args: argparse.Namespace) -> int:
    if args.workers < 0:
        return complain(f"--workers is {args.workers}; choose 0 or more")
    options.export_stores(args)
    settings = ServiceSettings()
    if settings.redis_url:
        _check_redis(settings)
    connections.raise_file_limit(settings)

    with contextlib.ExitStack() as loading, contextlib.ExitStack() as running:
        sockets = _bind(args.host, args.port, settings, running)
        loading.enter_context(without_garbage_collection())
        # import before the workers start, because they compete for the CPU
        from service.cli.api_server import ApiServer
        from worker.telemetry import logs, tracing

        logs.setup("INFO")
        tracing.setup("afterimage-api")
        signal.signal(signal.SIGTERM, _exit)
        if not settings.redis_url:
            _start_private_redis(settings.cache_dir, running)
        running.enter_context(Supervisor(_child_commands(args.workers), settings.grace_s))
        say("loading models")
        os.environ.setdefault("AFTERIMAGE_METRICS_HOST", args.host)

        def on_ready() -> None:
            loading.close()
            say(f"Afterimage is ready at {listening.address(sockets)}  (Ctrl-C stops it)")

        server = ApiServer(on_ready)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets)
    gc.freeze()  # otherwise the collection at the interpreter's exit takes seconds
    return 0 if server.started else 1


def _bind(
    host: str, port: int, settings: ServiceSettings, running: contextlib.ExitStack
) -> list[socket.socket]:
    """Bind the API's sockets, which close with `running`. Raises `CannotListen`.

    This comes first: a port in use is reported before anything is started or loaded.
    """
    sockets = listening.bind(host, port)
    for bound in sockets:
        running.callback(bound.close)
    if settings.metrics_port:
        metrics_host = os.environ.get("AFTERIMAGE_METRICS_HOST") or host
        for tried in listening.bind(metrics_host, settings.metrics_port, "AFTERIMAGE_METRICS_PORT"):
            tried.close()
    return sockets


def _check_redis(settings: ServiceSettings) -> None:
    """Raise `AfterimageError` for a wrong URL or an unsuitable server.

    A server that is unreachable is no error: the API starts without it and reconnects.
    """
    from worker.queue import store

    connected = store.connect(settings)
    with contextlib.suppress(store.RedisError):
        connected.check()
    connected.close()


def _start_private_redis(cache_dir: Path, running: contextlib.ExitStack) -> None:
    """Start queue and cache servers, which stop with `running`, and export their URLs."""
    from worker.queue import private_redis

    say("REDIS_URL is not set; starting a private Redis")
    queue_url, cache_url = running.enter_context(private_redis.servers(cache_dir))
    os.environ["REDIS_URL"] = queue_url
    os.environ.setdefault("CACHE_REDIS_URL", cache_url)


def _child_commands(workers: int) -> list[tuple[str, ...]]:
    """Commands of the child processes: workers and, if there is a webhook secret, the sender."""
    from worker.webhooks.settings import WebhookSettings

    return [WORKER] * workers + ([WEBHOOK_SENDER] if WebhookSettings().secrets else [])


def _worker(args: argparse.Namespace) -> int:
    options.export_stores(args)
    os.execv(WORKER[0], WORKER)


def _exit(_signal: int, _frame: FrameType | None) -> None:
    """Raise `SystemExit`, so that context managers stop the child processes."""
    raise SystemExit(0)
