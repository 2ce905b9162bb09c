"""Command-line options that several commands share."""

import argparse
import os
from pathlib import Path
from typing import Any

from models.codec.architectures import ARCHITECTURES
from models.codec.bitstream import METRICS


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Add the input files, at least one."""
    command.add_argument(
        "inputs", type=Path, nargs="+", metavar="IN", help="input files; - is stdin"
    )


def add_output(command: argparse.ArgumentParser) -> None:
    """Add `--output`, a file or a folder."""
    command.add_argument(
        "-o",
        "--output",
        required=True,
        help="output file; or a folder, if it exists, ends with / or there are several inputs; "
        "- is stdout",
    )


def add_quality(command: argparse.ArgumentParser, **options: Any) -> None:
    """Add `--quality`; `options` go to `add_argument`."""
    command.add_argument("--quality", "-q", type=int, choices=range(1, 9), **options)


def add_metric(command: argparse.ArgumentParser, *aliases: str, help: str) -> None:
    """Add `--metric`, the metric that codec weights were trained for."""
    command.add_argument("--metric", *aliases, choices=METRICS, default="mse", help=help)


def add_model(command: argparse.ArgumentParser, **options: Any) -> None:
    """Add `--model`, the architecture of a codec; `options` go to `add_argument`."""
    command.add_argument("--model", choices=tuple(ARCHITECTURES), **options)


def add_stores(command: argparse.ArgumentParser, without: str) -> None:
    """Add the URLs of both Redis servers; `without`: help text on what happens without any URL."""
    command.add_argument(
        "--redis-url", help=f"Redis server of the queue (default: REDIS_URL; without it {without})"
    )
    command.add_argument(
        "--cache-redis-url",
        help="Redis server of the picture cache (default: CACHE_REDIS_URL, else that of the queue)",
    )


def export_stores(args: argparse.Namespace) -> None:
    """Write the URLs from `add_stores` to the environment, where child processes read them."""
    for name, url in (("REDIS_URL", args.redis_url), ("CACHE_REDIS_URL", args.cache_redis_url)):
        if url:
            os.environ[name] = url
