"""Processes of pytest-xdist that are forked from the server of `tests.support.forked`.

All of them, and the services that their tests fork, share that server's imports and weights. A new
process spends about five seconds of CPU time on imports, and as much on a server of its own.
"""

import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from execnet import gateway_io
from execnet.gateway_base import Popen2IO

from tests.support import forked


def fork() -> Callable[[], None]:
    """Let pytest-xdist fork its processes from now on; return what ends this."""
    forked.fork_server()
    patch = pytest.MonkeyPatch()
    patch.setattr(gateway_io, "Popen2IOMaster", _Gateway)
    return patch.undo


class _Gateway(Popen2IO):
    """Standard input and output of a forked process, which runs `python … -c CODE`."""

    def __init__(self, command: list[str], execmodel: Any) -> None:
        stdin, requests = Pipe(duplex=False)
        replies, stdout = Pipe(duplex=False)
        context, _ = forked.fork_server()
        self._process = context.Process(
            target=_run, args=(command[-1], stdin, stdout, dict(os.environ), Path.cwd())
        )
        self._process.start()
        stdin.close()
        stdout.close()
        super().__init__(
            os.fdopen(os.dup(requests.fileno()), "wb"), os.fdopen(os.dup(replies.fileno()), "rb"),
            execmodel,
        )  # fmt: skip

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _run(
    code: str, stdin: Connection, stdout: Connection, environment: Mapping[str, str], folder: Path
) -> None:
    """Become like a new process: standard input and output, environment, folder; run `code`."""
    for number, connection in enumerate((stdin, stdout)):
        os.dup2(connection.fileno(), number)
        connection.close()
    sys.stdin = open(0, closefd=False)
    forked.keep_fork_server()  # before the environment changes: it has the server's variables
    forked.replace_environment(environment)
    os.chdir(folder)
    exec(code, {"__name__": "__main__"})
