"""`afterimage weights import`, `export`, `list` and `remove`: imported codec weights."""

import argparse
from pathlib import Path
from typing import Any

from models.codec.architectures import DEFAULT
from models.errors import AfterimageError
from service.cli import options
from service.cli.terminal import say
from service.settings import ServiceSettings
from worker.settings import without_garbage_collection

ZOO = "zoo"
"""Value of `import SOURCE` for which CompressAI's published weights are downloaded."""


def add(commands: Any) -> None:
    """Add `weights` to the parser's commands."""
    weights = commands.add_parser("weights", help="import, export, list and remove codec weights")
    actions = weights.add_subparsers(required=True, metavar="COMMAND")

    importer = actions.add_parser(
        "import", help="install a checkpoint of a CompressAI model; restart services to use it"
    )
    importer.add_argument(
        "source",
        metavar="FILE|zoo",
        help="checkpoint: .pth, .pth.tar or .safetensors; zoo: download CompressAI's weights",
    )
    _add_codec(importer)
    options.add_model(
        importer,
        default="",
        help="model of the weights (default: that of FILE; zoo: mbt2018-mean)",
    )
    importer.set_defaults(run=_import)

    exporter = actions.add_parser("export", help="write a state dict that CompressAI can load")
    _add_codec(exporter)
    options.add_model(
        exporter, default=DEFAULT, help="model of the weights (default: mbt2018-mean)"
    )
    exporter.add_argument("--id", default="", help="weights id (default: the ones in use)")
    exporter.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write: .pth or .safetensors"
    )
    exporter.set_defaults(run=_export)

    lister = actions.add_parser(
        "list", help="list installed weights; the first of each quality and metric is in use"
    )
    lister.set_defaults(run=_list)

    remover = actions.add_parser("remove", help="remove imported weights")
    remover.add_argument("id", help="weights id, as `afterimage weights list` prints it")
    remover.set_defaults(run=_remove)


def _add_codec(command: argparse.ArgumentParser) -> None:
    options.add_quality(command, required=True, help="quality of the weights, 1 to 8")
    options.add_metric(command, "-m", help="metric of the weights (default: mse)")


def _import(args: argparse.Namespace) -> int:
    with without_garbage_collection():
        from models.codec import interchange

    folder = ServiceSettings().weights_dir
    if args.source == ZOO:
        entry = interchange.install_from_zoo(
            args.quality, args.metric, folder, args.model or DEFAULT
        )
    else:
        entry = interchange.install(
            Path(args.source), args.quality, args.metric, folder, model=args.model
        )
    model = f"{entry.model}, " if entry.model else ""
    say(f"{entry.weights_id} is installed as {model}quality {entry.quality}, metric {entry.metric}")
    return 0


def _export(args: argparse.Namespace) -> int:
    with without_garbage_collection():
        from models import checkpoint
        from models.codec import catalogue, interchange, state_dicts

    interchange.check_suffix(args.output)
    rows = [*catalogue.imported(ServiceSettings().weights_dir), *catalogue.shipped()]
    installed = catalogue.find(rows, args.quality, args.metric, args.id, args.model)
    if installed is None:
        with_id = f" with the id {args.id}" if args.id else ""
        of = "" if args.model == DEFAULT else f"of {args.model} "
        raise AfterimageError(
            f"no weights {of}for quality {args.quality}, metric {args.metric}{with_id} are "
            "installed; see `afterimage weights list`"
        )
    tensors = checkpoint.load(installed.entry, installed.folder)
    interchange.write(
        state_dicts.to_compressai(tensors, catalogue.model_of(installed.entry)), args.output
    )
    return 0


def _list(_args: argparse.Namespace) -> int:
    from models.codec import catalogue

    table = [("id", "kind", "model", "quality", "metric", "file", "source")]
    for row in [*catalogue.imported(ServiceSettings().weights_dir), *catalogue.shipped()]:
        entry = row.entry
        quality, metric = str(entry.quality or "-"), entry.metric or "-"
        source = entry.source or "shipped"
        model = catalogue.model_of(entry) or "-"
        table.append((entry.weights_id, entry.kind, model, quality, metric, entry.file, source))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        say("  ".join(padded).rstrip())
    return 0


def _remove(args: argparse.Namespace) -> int:
    from models.codec import catalogue

    rows = catalogue.imported(ServiceSettings().weights_dir)
    matches = [row for row in rows if row.entry.weights_id == args.id]
    if not matches:
        raise AfterimageError(
            f"no imported weights have the id {args.id}; see `afterimage weights list`"
        )
    for row in matches:
        catalogue.remove(row)
        say(f"removed {row.folder / row.entry.file}")
    return 0
