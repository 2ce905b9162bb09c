"""Command-line options that several commands share."""

import argparse
import os
from pathlib import Path
from typing import Any

from models.codec.architectures import ARCHITECTURES
from models.codec.bitstream import METRICS

URL = "http://127.0.0.1:8000"
"""The service that commands use by default."""
JOBS = 8
"""Files that are in work at a service at a time by default."""


def add_inputs(command: argparse.ArgumentParser, at_least_one: bool = True) -> None:
    """Add the input files."""
    command.add_argument(
        "inputs",
        type=Path,
        nargs="+" if at_least_one else "*",
        metavar="IN",
        help="input files; - is stdin",
    )


def add_output(command: argparse.ArgumentParser) -> None:
    """Add `--output`, a file or a folder, and `--skip-existing`."""
    command.add_argument(
        "--skip-existing",
        action="store_true",
        help="skip inputs whose output exists already, to go on after an interruption",
    )
    command.add_argument(
        "-o",
        "--output",
        help="output file; or a folder, if it exists, ends with / or there are several inputs; "
        "- is stdout",
    )


def add_service(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that a service may run: its URL, objects of its stores."""
    service = command.add_argument_group(
        "at a service",
        "Its API key is in AFTERIMAGE_API_KEY. Without these, the work is done here.",
    )
    service.add_argument("--url", help=f"work at this service; IN may be folders (such as {URL})")
    service.add_argument(
        "--jobs",
        type=int,
        default=JOBS,
        metavar="N",
        help="at most N files at a time; fewer while the service refuses requests "
        f"(default: {JOBS})",
    )
    service.add_argument(
        "--source",
        metavar="store:NAME/KEY",
        help=f"instead of IN: an object in a store of the service (--url, default: {URL})",
    )
    service.add_argument(
        "--target",
        metavar="store:NAME/KEY",
        help="instead of --output: an object to write in a store of the service",
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
