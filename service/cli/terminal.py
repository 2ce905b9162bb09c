"""What the commands print."""

import sys


def say(text: str) -> None:
    """Print a line to stdout at once."""
    print(text, flush=True)  # noqa: T201


def complain(text: str) -> int:
    """Print an error to stderr; return the exit status 1."""
    print(f"afterimage: {text}", file=sys.stderr)  # noqa: T201
    return 1
