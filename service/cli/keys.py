"""`afterimage keys new`: make an API key."""

import argparse
import fcntl
import json
import os
import secrets
import sys
import tempfile
from datetime import date
from pathlib import Path

from service.keys import SCOPES, KeysError, digest, parse, read_text


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
        before = read_text(path) if path.exists() else ""
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
