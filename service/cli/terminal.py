"""Output of the commands: lines on stdout, errors on stderr."""

import json
import os
import sys


def note(text: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def say(text: str) -> None:
    """Print a line to stdout and flush it."""
    print(text, flush=True)  # noqa: T201


def say_json(value: object) -> None:
    """Print a value to stdout as a line of JSON.

    Characters that the terminal cannot show, such as bytes of a file name that are not UTF-8, are
    escaped.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    say(text)


def complain(text: str) -> int:
    """Print an error to stderr; returns 1, the exit status."""
    note(f"afterimage: {text}")
    return 1


def discard_stdout() -> None:
    """Drop what is still to be written to stdout, because its reader has gone.

    Python would write it at exit, and fail again.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
