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

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import sys
import tempfile
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
    return parse(_text(path), path)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise KeysError(f"{path}: {getattr(e, 'strerror', 'no UTF-8')}") from e


def add(parser: argparse.ArgumentParser) -> None:
    """Give `afterimage keys` its commands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="make a key; it is shown once, and only its digest kept")
    new.add_argument("name", metavar="NAME", help="whose it is; keys of one name share its limits")
    new.add_argument("--scopes", default="decode", help=f"of {','.join(SCOPES)} (default decode)")
    new.add_argument("--requests-per-minute", type=int, metavar="N")
    new.add_argument("--jobs-at-once", type=int, metavar="N", help="jobs that have not ended")
    new.add_argument("--expires", type=date.fromisoformat, metavar="DATE", help="last day, UTC")
    new.add_argument("--file", type=Path, help="append to this file of keys; default: print it")
    new.set_defaults(run=_new)


def _new(args: argparse.Namespace) -> int:
    token = f"ai_{secrets.token_urlsafe(32)}"
    table = _table(args, digest(token))
    (key,) = parse(table, "the new key")
    if key.expired:
        raise KeysError(f"the new key: expires: {key.expires} is over")
    if args.file:
        _append(args.file.resolve(), table)
    else:
        print(table, end="")  # noqa: T201
    print(f"The key, which is not shown again: {token}", file=sys.stderr)  # noqa: T201
    return 0


def _table(args: argparse.Namespace, sha256: str) -> str:
    fields = {"name": args.name, "sha256": sha256, "scopes": args.scopes.split(",")}
    fields |= {n: getattr(args, n) for n in ("requests_per_minute", "jobs_at_once")}
    lines = [f"{n} = {json.dumps(value)}\n" for n, value in fields.items() if value is not None]
    return "".join(("[[keys]]\n", *lines, f"expires = {args.expires}\n" if args.expires else ""))


def _append(path: Path, table: str) -> None:
    """Readers see the old file or the new one; who appends too waits. Raises `KeysError`."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = _text(path) if path.exists() else ""
        text = f"{before.rstrip()}\n\n{table}".lstrip()
        parse(text, path)
        _replace(path, text)
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    """Mode 0600 where it is new; else its mode and owner stay, so that the service can read it."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as private:
        part = Path(private) / path.name
        part.touch(0o600)
        part.write_text(text, "utf-8")
        if path.exists():
            before = path.stat()
            os.chown(part, before.st_uid, before.st_gid)
            part.chmod(before.st_mode & 0o777)
        part.replace(path)
