"""`afterimage keys new`: create an API key."""

import argparse
import secrets
import sys
from datetime import date
from pathlib import Path
from typing import Any

import tomlkit

from models.files import locked, write_output
from service.cli.terminal import say
from service.keys import MAX_WEIGHT, MIN_WEIGHT, SCOPES, KeysError, digest, parse, read_text
from worker.queue.records import PRIORITIES


def add(commands: Any) -> None:
    """Add `keys` to the parser's commands."""
    keys = commands.add_parser("keys", help="create API keys")
    new = keys.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="create a key and print it once; only its SHA-256 is stored"
    )
    new.add_argument(
        "name",
        metavar="NAME",
        help="caller, 1 to 64 of A-Z a-z 0-9 . _ @ -; keys with the same name share their limits",
    )
    new.add_argument(
        "--scopes",
        default="decode",
        help=f"comma-separated list of what the key allows: {','.join(SCOPES)} (default: decode)",
    )
    new.add_argument(
        "--requests-per-minute",
        type=int,
        metavar="N",
        help="largest number of requests a minute, 1 or more (default: the service's limit)",
    )
    new.add_argument(
        "--jobs-at-once",
        type=int,
        metavar="N",
        help="largest number of unfinished jobs, 1 or more (default: the service's limit)",
    )
    new.add_argument(
        "--priority",
        choices=PRIORITIES,
        help="batch: workers take interactive jobs of other keys first (default: interactive)",
    )
    new.add_argument(
        "--weight",
        type=float,
        metavar="W",
        help=f"share of the drawings, {MIN_WEIGHT} to {MAX_WEIGHT:g}: a key with 2 gets twice as "
        "many as one with 1 while jobs of both wait (default: 1)",
    )
    new.add_argument(
        "--expires",
        type=date.fromisoformat,
        metavar="DATE",
        help="last day on which the key is valid, as 2027-01-31 (UTC; default: no end)",
    )
    new.add_argument(
        "--file", type=Path, help="append the key to this key file (default: print its entry)"
    )
    new.set_defaults(run=_new)


def _new(args: argparse.Namespace) -> int:
    token = f"ai_{secrets.token_urlsafe(32)}"
    entry = _entry(args, digest(token))
    (key,) = parse(entry, "the new key")
    if key.expired:
        raise KeysError(f"the new key: expires: {key.expires} is in the past; choose a later day")
    if args.file:
        _append(args.file.resolve(), entry)
    else:
        say(entry.rstrip())
    print(f"The key, which is not shown again: {token}", file=sys.stderr)  # noqa: T201
    return 0


def _entry(args: argparse.Namespace, sha256: str) -> str:
    """The key's `[[keys]]` table as TOML."""
    fields = {
        "name": args.name,
        "sha256": sha256,
        "scopes": args.scopes.split(","),
        "requests_per_minute": args.requests_per_minute,
        "jobs_at_once": args.jobs_at_once,
        "priority": args.priority,
        "weight": args.weight,
        "expires": args.expires,
    }
    key = {name: value for name, value in fields.items() if value is not None}
    return tomlkit.dumps({"keys": [key]})


def _append(path: Path, entry: str) -> None:
    """Append an entry to a key file; comments and layout of the file are kept.

    The file is replaced atomically: readers see the old or the new content. A new file can be read
    by its owner only. Concurrent writers wait for each other. Raises `KeysError` if the file is not
    a valid key file, which is then unchanged.
    """
    with locked(path.parent):
        content = read_text(path).rstrip() if path.exists() else ""
        text = f"{content}\n\n{entry}".lstrip()
        parse(text, path)
        write_output(path, text.encode(), 0o600)
