"""Processes that are forked from one that has imported torch and loaded the shipped weights.

A new process spends about six seconds of CPU time on imports and weights, a forked one none. Each
forked process has its own signals, exit status, environment, working directory, and output file.
`afterimage` and `python -m worker.main` themselves run in the tests of services that are not forked
and in those of the command line. A forked service forks the processes that its supervisor starts
with it; those that the supervisor starts again later are new ones.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

READ_AT_IMPORT = (
    "AFTERIMAGE_SECRETS_DIR", "HOME", "LD_", "MALLOC_", "MKL_", "NUMBA_", "OMP_", "OPENBLAS_",
    "PYTHON", "TORCH", "XDG_",
)  # fmt: skip
"""Prefixes of variables that are read during imports. In all forked processes, they have the values
that they had when the first one was started."""
SET_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"
"""A variable that torch sets in this process when it imports its compiler; it is read later."""


class Process(Protocol):
    """The methods of `subprocess.Popen` that tests use."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A forked process that runs `main()` and writes stdout and stderr to `log`."""

    def __init__(self, main: Callable[[], int], environment: Mapping[str, str], log: Path) -> None:
        context, inherited = fork_server()
        changed = dict(_read_at_import(environment).items() ^ inherited.items())
        if changed:
            names = ", ".join(sorted(changed))
            raise ValueError(f"{names}: read during imports; start a process that is not forked")
        self._process = context.Process(
            target=_run, args=(main, dict(environment), Path.cwd(), log), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since, as in `Popen`
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def worker_main() -> int:
    """Run a worker, as `python -m worker.main` does."""
    from worker import main

    return main.main()


def sender_main() -> int:
    """Send webhooks, as `python -m worker.webhooks` does."""
    from worker.webhooks import sender

    return sender.main()


def command(arguments: tuple[str, ...]) -> int:
    """Run the `afterimage` command with these arguments; `serve` forks its child processes."""
    from service.cli import main, supervisor
    from worker.queue.private_redis import die_with_parent

    start = supervisor.Supervisor._start

    def start_child(self: supervisor.Supervisor, command: supervisor.Command) -> Any:
        """Fork a child process, unless the API runs: one of its threads may hold a lock."""
        if len(os.listdir("/proc/self/task")) > 1:
            return start(self, command)
        return _Child(command, env=self._environment, preexec_fn=die_with_parent)

    with mock.patch.object(supervisor.Supervisor, "_start", start_child):
        return main.main(arguments)


def trainer(arguments: tuple[str, ...]) -> int:
    """Run `python -m models.train` with these arguments."""
    from models.train import __main__

    sys.argv[1:] = arguments
    __main__.main()
    return 0


class _Child(subprocess.Popen[bytes]):
    """A child process of a service, forked from it instead of started."""

    def _execute_child(
        self, args: Sequence[str], executable: object, preexec_fn: Callable[[], None],
        close_fds: object, pass_fds: object, cwd: object, env: Mapping[str, str], *_: object,
    ) -> None:  # fmt: skip
        """Fork; the child runs the `main` of its command and exits."""
        self._child_created = True
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            preexec_fn()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with the service's sockets
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            replace_environment(env)
            gc.enable()
            os._exit(worker_main() if args[-1] == "worker.main" else sender_main())
        except BaseException:
            traceback.print_exc()
            os._exit(1)


@functools.cache
def fork_server() -> tuple[ForkServerContext, dict[str, str]]:
    """Start the fork server; also return those of its variables that are read during imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    inherited = _read_at_import(os.environ)
    with mock.patch.dict(os.environ, inherited):
        forkserver._forkserver.ensure_running()
    return context, inherited


def keep_fork_server() -> None:
    """Let this process, which is forked from the server, use it too: Python would start another."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    fork_server()


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    given = {name: v for name, v in environment.items() if name.startswith(READ_AT_IMPORT)}
    given.pop(SET_BY_TORCH, None)
    # `prepare_process` sets the first; with one thread, the tests' small networks are faster
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"} | given


def _run(main: Callable[[], int], environment: dict[str, str], folder: Path, log: Path) -> None:
    """Become like a new process: environment, folder, output; then run `main` and exit."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    replace_environment(environment)
    os.chdir(folder)
    from tests.support import weights  # imports torch

    with weights.loaded_once():
        sys.exit(main())


def replace_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
