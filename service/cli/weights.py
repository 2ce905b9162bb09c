"""`afterimage weights import | export | list | remove`: codec weights of the user's own."""

import argparse
from pathlib import Path

from models.codec.bitstream import METRICS
from models.errors import AfterimageError
from service.cli.terminal import say
from service.settings import ServiceSettings

ZOO = "zoo"
"""In place of a file: CompressAI's published weights."""


def add(parser: argparse.ArgumentParser) -> None:
    """Give `afterimage weights` its commands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    into = commands.add_parser(
        "import", help="install a CompressAI checkpoint of mbt2018-mean; services read it on start"
    )
    into.add_argument(
        "source", metavar="FILE|zoo", help=".pth, .pth.tar or .safetensors; zoo: download it"
    )
    _which(into)
    into.set_defaults(run=_import)

    out = commands.add_parser("export", help="write a state dict that CompressAI loads")
    _which(out)
    out.add_argument("--id", default="", help="these weights, where several are installed")
    out.add_argument("-o", "--output", type=Path, required=True, help=".pth or .safetensors")
    out.set_defaults(run=_export)

    listed = commands.add_parser("list", help="what is installed; of equals the first is used")
    listed.set_defaults(run=_list)

    remove = commands.add_parser("remove", help="remove what was imported")
    remove.add_argument("id", help="weights id")
    remove.set_defaults(run=_remove)


def _which(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quality", "-q", type=int, choices=range(1, 9), required=True)
    command.add_argument("--metric", "-m", choices=METRICS, default="mse")


def _import(args: argparse.Namespace) -> int:
    from models.codec import interchange

    folder = ServiceSettings().weights_dir
    if args.source == ZOO:
        entry = interchange.install_from_zoo(args.quality, args.metric, folder)
    else:
        entry = interchange.install(Path(args.source), args.quality, args.metric, folder)
    say(f"{entry.weights_id} is installed as quality {entry.quality}, metric {entry.metric}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from models import checkpoint
    from models.codec import catalogue, interchange

    interchange.check_suffix(args.output)
    rows = [*catalogue.imported(ServiceSettings().weights_dir), *catalogue.shipped()]
    found = catalogue.find(rows, args.quality, args.metric, args.id)
    if found is None:
        named = f" with the id {args.id}" if args.id else ""
        raise AfterimageError(
            f"no weights for quality {args.quality}, metric {args.metric}{named} are installed"
        )
    tensors = checkpoint.load(found.entry, found.folder)
    interchange.write(interchange.to_compressai(tensors), args.output)
    return 0


def _list(_args: argparse.Namespace) -> int:
    from models.codec import catalogue

    rows = [("id", "kind", "quality", "metric", "file", "source")]
    for row in [*catalogue.imported(ServiceSettings().weights_dir), *catalogue.shipped()]:
        e = row.entry
        quality = str(e.quality or "-")
        source = e.source or "shipped"
        rows.append((e.weights_id, e.kind, quality, e.metric or "-", e.file, source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        say("  ".join(padded).rstrip())
    return 0


def _remove(args: argparse.Namespace) -> int:
    from models.codec import catalogue

    rows = catalogue.imported(ServiceSettings().weights_dir)
    found = [row for row in rows if row.entry.weights_id == args.id]
    if not found:
        raise AfterimageError(f"nothing with the id {args.id} was imported")
    for row in found:
        catalogue.remove(row)
        say(f"removed {row.folder / row.entry.file}")
    return 0
