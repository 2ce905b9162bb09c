"""Output of the commands: lines on stdout, errors on stderr."""

import sys


def say(text: str) -> None:
    """Print a line to stdout and flush it."""
    print(text, flush=True)  # noqa: T201


def complain(text: str) -> int:
    """Print an error to stderr; returns 1, the exit status."""
    print(f"afterimage: {text}", file=sys.stderr)  # noqa: T201
    return 1
