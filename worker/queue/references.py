"""References to objects in object stores, and the errors that their use may raise.

A reference is `store:NAME/KEY`. Only stores of the file `AFTERIMAGE_STORES` can be named, and only
keys below a store's URL.
"""

import re
from dataclasses import dataclass

from models.errors import AfterimageError, ParameterError
from worker.queue.object_config import NAME

MAX_KEY_BYTES = 1024
"""Longest key of S3, GCS and Azure."""

_REFERENCE = re.compile(rf"store:({NAME})/(.+)", re.DOTALL)
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ufffd]")
"""Control characters, the backslash, which some stores take for a slash, and invalid UTF-8."""


class StoreNotFound(AfterimageError):
    """There is no object store with this name for this caller."""

    kind = "store-not-found"


class StoreForbidden(AfterimageError):
    """The object store may not be read, or not be written."""

    kind = "store-forbidden"


class ObjectNotFound(AfterimageError):
    """The object store holds no object under this key."""

    kind = "object-not-found"


class StoreRefused(AfterimageError):
    """The object store refused the request; another try would not help."""

    kind = "store-refused"


class StoreAway(AfterimageError):
    """The object store did not answer, or has failed; try again later."""

    kind = "store-away"


StoreError = (StoreNotFound, StoreForbidden, ObjectNotFound, StoreRefused, StoreAway)
"""All that an operation on an object may raise."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A key in a configured store."""

    store: str
    key: str

    def __str__(self) -> str:
        return f"store:{self.store}/{self.key}"

    @classmethod
    def parse(cls, text: str, parameter: str) -> "Reference":
        """Parse `store:NAME/KEY`. Raises `ParameterError`, which names the `parameter`."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise ParameterError(f"{parameter} is {text[:100]!r}; write store:NAME/KEY")
        key = match[2]
        if len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
            raise ParameterError(f"{parameter}: the key is longer than {MAX_KEY_BYTES} bytes")
        if _FORBIDDEN.search(key):
            raise ParameterError(
                f"{parameter}: the key {key[:100]!r} holds a control character, a backslash or "
                "invalid UTF-8; remove it"
            )
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise ParameterError(
                f"{parameter}: the key {key[:100]!r} has an empty part, '.' or '..'; write the "
                "whole key, without a slash at its beginning or end"
            )
        return cls(match[1], key)


def parse_prefix(text: str, parameter: str) -> Reference:
    """Parse `store:NAME/PREFIX/`, or `store:NAME/` for all of a store; the key ends with a slash.

    Raises `ParameterError`, which names the `parameter`.
    """
    if not text.endswith("/"):
        raise ParameterError(
            f"{parameter} is {text[:100]!r}; end a prefix with a slash: store:NAME/PREFIX/"
        )
    name = Reference.parse(f"{text}name", parameter)
    return Reference(name.store, name.key.removesuffix("name"))
