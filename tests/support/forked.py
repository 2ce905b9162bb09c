"""Processes that are forked from one that has imported torch already.

A new process spends about five seconds of CPU time on imports, a forked one none. Each forked
process has its own signals, exit status, environment, working directory, and output file.
`afterimage` and `python -m worker.main` themselves run in the tests of services that are not forked
and in those of the command line.
"""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol
from unittest import mock

READ_AT_IMPORT = (
    "AFTERIMAGE_SECRETS_DIR", "HOME", "LD_", "MALLOC_", "MKL_", "NUMBA_", "OMP_", "OPENBLAS_",
    "PYTHON", "TORCH", "XDG_",
)  # fmt: skip
"""Beginnings of the names of variables that are read during imports: all forked processes have the
values that these had when the first one was started."""


class Process(Protocol):
    """What tests use of a `subprocess.Popen`."""

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
        context, inherited = _fork_server()
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
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def worker_main() -> int:
    """Run a worker, as `python -m worker.main` does."""
    from worker import main

    return main.main()


def command(arguments: tuple[str, ...]) -> int:
    """Run the `afterimage` command with these arguments."""
    from service.cli import main

    return main.main(arguments)


@functools.cache
def _fork_server() -> tuple[ForkServerContext, dict[str, str]]:
    """Start the fork server; also return those of its variables that are read during imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    inherited = _read_at_import(os.environ)
    with mock.patch.dict(os.environ, inherited):
        forkserver.ensure_running()
    return context, inherited


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    given = {name: v for name, v in environment.items() if name.startswith(READ_AT_IMPORT)}
    return {"OMP_WAIT_POLICY": "PASSIVE"} | given  # the default that `prepare_process` sets


def _run(main: Callable[[], int], environment: dict[str, str], folder: Path, log: Path) -> None:
    """Become like a new process: environment, folder, output; then run `main` and exit."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.exit(main())
