"""Output of the commands: lines on stdout, errors on stderr."""

import sys


def note(text: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def say(text: str) -> None:
    """Print a line to stdout and flush it."""
    print(text, flush=True)  # noqa: T201


def complain(text: str) -> int:
    """Print an error to stderr; returns 1, the exit status."""
    note(f"afterimage: {text}")
    return 1
