"""API keys: a TOML file lists their digests; `afterimage keys new` adds keys.

Several keys may have the same name: they belong to one caller, as during a rotation. Each key is a
table:

    [[keys]]
    name = "gallery"
    sha256 = "…"                 # hex digest of the key
    scopes = ["decode"]          # decode, encode, operate: one or more
    requests_per_minute = 60     # optional, like all that follow
    jobs_at_once = 4
    priority = "batch"           # interactive (default) or batch: after all interactive jobs
    weight = 2                   # share of the drawings among callers that wait (default: 1)
    expires = 2027-01-31         # the last day on which the key is valid, UTC
"""

import hashlib
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import AfterimageError
from worker.queue.records import Priority

Scope = Literal["decode", "encode", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
"""Limits of a key's weight."""


class KeysError(AfterimageError):
    """The file of API keys is missing or invalid."""


class Key(BaseModel):
    """The entry of a key in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")  # becomes part of Redis keys
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: list[Scope] = Field(min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    jobs_at_once: int | None = Field(None, ge=1)
    priority: Priority = "interactive"
    weight: float = Field(1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)
    expires: date | None = None

    @property
    def expired(self) -> bool:
        """Whether the last day on which the key is valid is over."""
        return self.expires is not None and self.expires < datetime.now(UTC).date()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Key] = []  # empty: every request is refused, as after the last key is removed


def digest(token: str) -> str:
    """Return the SHA-256 of a key in hex, which is all that the file stores.

    A fast hash is safe: keys are 32 random bytes, too many to guess.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def parse(text: str, source: object) -> list[Key]:
    """Parse the text of a file; `source` names the file in errors.

    Raises `KeysError` that names the line or the field, such as `keys.0.name`.
    """
    try:
        keys = _File.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as e:
        raise KeysError(f"{source}: not valid TOML: {e}") from e
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        raise KeysError(f"{source}: {faults}") from None
    if len({key.sha256 for key in keys}) < len(keys):
        raise KeysError(f"{source}: keys: two keys have the same sha256; remove one of them")
    return keys


def read(path: Path) -> list[Key]:
    """Read the keys of a file. Raises `KeysError` if it is missing or invalid."""
    return parse(read_text(path), path)


def read_text(path: Path) -> str:
    """Read the text of a file. Raises `KeysError`."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise KeysError(f"{path}: {getattr(e, 'strerror', 'the file is not UTF-8 text')}") from e
