"""The `afterimage` command; its parts are modules of `service.cli`."""

import argparse
import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from pydantic import ValidationError

from models.errors import AfterimageError
from service import __version__
from service.cli import batch, codec, keys, queue, serve, weights
from service.cli.parser import Parser
from service.cli.terminal import complain, discard_stdout
from service.settings import ServiceSettings
from worker.settings import faults, prepare_process

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it: 128 + SIGINT."""


def run() -> NoReturn:
    """Run a command, and end the process without freeing all objects first.

    With torch, that would take half a second. Handlers of `atexit` run, and output is flushed.
    """
    status = main()
    others = set(threading.enumerate()) - {threading.current_thread()}
    if not all(thread.daemon for thread in others):
        sys.exit(status)  # which waits for them
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:  # Python reports it
        sys.exit(status)
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    The status is 1 after an error, which is printed to stderr as one line. Wrong usage raises
    `SystemExit(2)`.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        prepare_process(ServiceSettings())
        return command(args)
    except ValidationError as e:
        return complain(f"invalid settings in the environment: {faults(e)}")
    except BrokenPipeError:  # as in `afterimage inspect … | head -1`
        discard_stdout()
        return 1
    except OSError as e:
        return complain(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except AfterimageError as e:
        return complain(str(e))
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser("afterimage")
    parser.add_argument("--version", action="version", version=f"afterimage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (serve, codec, batch, queue, keys, weights):
        module.add(commands)
    return parser


if __name__ == "__main__":
    run()
