"""API keys: the TOML file that lists their digests, and `afterimage keys new`.

Keys of one name are one caller, as while one is replaced. Each key is a table:

    [[keys]]
    name = "gallery"
    sha256 = "…"                 # of the key, hex
    scopes = ["decode"]          # of decode, encode
    requests_per_minute = 60     # optional, as are the next two
    jobs_at_once = 4
    expires = 2027-01-31         # its last day, UTC
"""

import hashlib
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import AfterimageError

Scope = Literal["decode", "encode"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class KeysError(AfterimageError):
    """The file of API keys cannot be used."""


class Key(BaseModel):
    """A key, as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")  # it becomes part of Redis keys
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: list[Scope] = Field(min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    jobs_at_once: int | None = Field(None, ge=1)
    expires: date | None = None

    @property
    def expired(self) -> bool:
        """Whether its last day is over."""
        return self.expires is not None and self.expires < datetime.now(UTC).date()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Key] = []  # none: nobody may ask, as when the last key was withdrawn


def digest(token: str) -> str:
    """What is kept of a key: SHA-256, hex. A fast hash is right: nobody guesses 32 random bytes."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse(text: str, source: object) -> list[Key]:
    """The keys that a text lists. Raises `KeysError` with line or field, as `keys.0.name`."""
    try:
        keys = _File.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as e:
        raise KeysError(f"{source}: no TOML: {e}") from e
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        raise KeysError(f"{source}: {wrong}") from None
    if len({key.sha256 for key in keys}) < len(keys):
        raise KeysError(f"{source}: keys: two have the same sha256")
    return keys


def read(path: Path) -> list[Key]:
    """The keys of a file. Raises `KeysError` for one that is missing or wrong."""
    return parse(read_text(path), path)


def read_text(path: Path) -> str:
    """The file's text. Raises `KeysError`."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise KeysError(f"{path}: {getattr(e, 'strerror', 'no UTF-8')}") from e
