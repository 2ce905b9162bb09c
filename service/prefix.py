"""The path prefix under which a proxy serves the API, such as `/after` of `https://host/after/`."""

import re
from contextvars import ContextVar

from starlette.types import Scope

MAX_LENGTH = 200
"""Characters of the longest prefix."""
current: ContextVar[str] = ContextVar("prefix", default="")
"""The prefix of the request that is being answered; empty if there is none."""
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def parse(text: str) -> str:
    """Return a prefix without a slash at its end; empty if `text` is `/` or empty.

    Raises `ValueError` unless it is a path of `_PREFIX`'s characters without `.` and `..`, which
    clients resolve differently.
    """
    prefix = text.removesuffix("/")
    plain = _PREFIX.fullmatch(prefix[: MAX_LENGTH + 1]) and len(prefix) <= MAX_LENGTH
    if not plain or {".", ".."} & set(prefix.split("/")):
        raise ValueError(
            f"the path prefix {text[:MAX_LENGTH]!r} is not valid; write it like /name, with "
            f"letters, digits and . _ ~ - only, in at most {MAX_LENGTH} characters"
        )
    return prefix


def prepend(scope: Scope, prefix: str) -> Scope:
    """Return the scope with the prefix that the proxy has removed from the request's path."""
    raw_path = prefix.encode() + (scope.get("raw_path") or b"")
    return {**scope, "root_path": prefix, "path": prefix + scope["path"], "raw_path": raw_path}


def public(path: str) -> str:
    """Return a path of the API with the prefix: the path under which the client reaches it."""
    return current.get() + path


def routed(path: str) -> str:
    """Return a path of this request without the prefix, as the API's routes are declared."""
    return path.removeprefix(current.get())
