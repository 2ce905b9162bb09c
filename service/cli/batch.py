"""`afterimage batch`: batches of a service."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from models.errors import AfterimageError
from models.pictures.output_formats import OutputFormat
from models.tiers import TIERS, check_realism, check_seed
from service.cli import options, remote
from service.cli.codec import SAMPLER_SETTINGS, add_sampler
from service.cli.files import STDIO
from service.cli.terminal import say

if TYPE_CHECKING:  # importing it takes a second
    from service.client import Client

PRIORITIES = ("interactive", "batch")


def add(commands: Any) -> None:
    """Add `batch` to the parser's commands."""
    batch = commands.add_parser("batch", help="decode many objects of object stores at a service")
    actions = batch.add_subparsers(required=True, metavar="COMMAND")
    _add_submit(actions.add_parser("submit", help="submit a batch"))
    listing = actions.add_parser("list", help="list batches, newest first")
    listing.add_argument(
        "--limit", type=int, default=20, metavar="N", help="at most N batches (default: 20)"
    )
    _add_url(listing)
    listing.set_defaults(run=_list)
    for name, help in (
        ("status", "show the state of a batch"),
        ("cancel", "cancel what has not begun"),
        ("retry", "take failed items again"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("id", metavar="ID", help="id of the batch")
        if name == "status":
            action.add_argument(
                "--failed", action="store_true", help="print the failed items as JSON lines"
            )
        _add_common(action)
        action.set_defaults(run=_act, action=name)


def _add_submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("source", nargs="?", help="prefix of the sources: store:NAME/PREFIX/")
    submit.add_argument("target", nargs="?", help="prefix of the targets: store:NAME/PREFIX/")
    submit.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="instead of prefixes: JSON lines with source, target and, if wanted, seed; - is stdin",
    )
    submit.add_argument("--suffix", help="of the sources below a prefix (default: .msh)")
    submit.add_argument(
        "--format",
        choices=get_args(OutputFormat),
        help="of the pictures (default: as the suffixes of the targets; below a prefix, png)",
    )
    submit.add_argument(
        "--tier",
        choices=[tier.name for tier in TIERS.values() if tier.settings],
        default="perceptual",
        help="a diffusion tier (default: perceptual)",
    )
    add_sampler(submit)
    submit.add_argument(
        "--priority", choices=PRIORITIES, help="of the decodes, at most the key's (default: batch)"
    )
    submit.add_argument(
        "--on-existing",
        choices=("skip", "replace"),
        help="what to do about targets that exist already (default: skip)",
    )
    submit.add_argument(
        "--webhook", action="append", metavar="URL", help="https URL to notify at the end"
    )
    _add_common(submit)
    submit.set_defaults(run=_submit)


def _add_common(command: argparse.ArgumentParser) -> None:
    _add_url(command)
    command.add_argument("--watch", action="store_true", help="show the counts until it has ended")


def _add_url(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url",
        default=options.URL,
        help=f"the service; its API key is in AFTERIMAGE_API_KEY (default: {options.URL})",
    )


def _submit(args: argparse.Namespace) -> int:
    check_seed(args.seed)
    check_realism(args.realism)
    names = (*SAMPLER_SETTINGS, "tier", "seed", "realism", "source", "target", "suffix", "format",
             "priority", "on_existing", "webhook")  # fmt: skip
    request = {name: getattr(args, name) for name in names}
    if args.items is not None:
        request["items"] = list(_items(args.items))
    with remote.connect(args.url) as client:
        return _report(client, client.batches.submit(**request), args.watch)


def _list(args: argparse.Namespace) -> int:
    if args.limit < 1:
        raise AfterimageError(f"--limit is {args.limit}; choose 1 or more")
    with remote.connect(args.url) as client:
        for batch in itertools.islice(client.batches.list(), args.limit):
            say(f"{batch['created'][:19].replace('T', ' ')}  {_line(batch)}")
    return 0


def _items(file: Path) -> Iterator[Any]:
    """The items of a file. Raises `AfterimageError`, which names the line."""
    text = sys.stdin.read() if file == STDIO else file.read_text("utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as e:
            raise AfterimageError(f"{file}, line {number}: not valid JSON: {e}") from None


def _act(args: argparse.Namespace) -> int:
    with remote.connect(args.url) as client:
        if args.action == "status" and args.failed:
            for item in client.batches.failed(args.id):
                say(json.dumps(item, ensure_ascii=False))
            return 0
        document = getattr(client.batches, args.action)(args.id)
        return _report(client, document, args.watch)


def _report(client: "Client", batch: dict[str, Any], watch: bool) -> int:
    """Print a batch, with `watch` until it has ended; returns 1 if items have failed by then."""
    say(_line(batch))
    if not watch:
        return 0
    for document in client.batches.follow(batch["id"]):
        if document["counts"] != batch["counts"] or document["status"] != batch["status"]:
            say(_line(document))
        batch = document
    return 1 if batch["counts"]["failed"] or batch["problem"] else 0


def _line(batch: dict[str, Any]) -> str:
    """A batch as one line: its id, status, the counts that are not 0, rate and time left."""
    counts = ", ".join(f"{count} {status}" for status, count in batch["counts"].items() if count)
    parts = [f"{batch['id']} {batch['status']}: {counts or 'no items'}"]
    if batch["listing"]:
        parts.append("listing")
    if batch["pictures_per_minute"]:
        parts.append(f"{batch['pictures_per_minute']:g} pictures per minute")
    if batch["eta_s"] is not None:
        parts.append(f"{batch['eta_s']:.0f} s left")
    if batch["problem"]:
        parts.append(batch["problem"]["detail"])
    return "; ".join(parts)
