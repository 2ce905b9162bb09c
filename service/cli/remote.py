"""`encode` and `decode` at a service: several files at a time, and objects in its stores."""

import argparse
import contextlib
import os
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from models.errors import AfterimageError
from service.cli import options
from service.cli.files import STDIO, picture_format, read_bitstream, read_picture, reason, write
from service.cli.pace import Pace, Refused
from service.cli.terminal import complain, note

if TYPE_CHECKING:  # importing it takes a second
    from service.client import AsyncClient, Client

BITSTREAMS = (".msh", ".bin")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp", ".pnm",
            ".ppm", ".heic", ".jxl")  # fmt: skip
"""Suffixes of the files that are taken from folders."""
OnStep = Callable[[int, int], None]
"""Is told that the request was accepted, with finished and all steps."""
Convert = Callable[["AsyncClient", Path, OnStep], Awaitable[bytes]]


def check(args: argparse.Namespace) -> None:
    """Raise `AfterimageError` unless there is one kind of input and one of output."""
    if args.source and args.inputs:
        raise AfterimageError(f"choose either the input {args.inputs[0]} or --source {args.source}")
    if args.target and args.output:
        raise AfterimageError(f"choose either --output {args.output} or --target {args.target}")
    if args.target and len(args.inputs) > 1:
        raise AfterimageError(
            "--target takes one input; `afterimage batch` decodes many objects of a store"
        )
    if args.jobs < 1:
        raise AfterimageError(f"--jobs is {args.jobs}; choose 1 or more")


@contextlib.contextmanager
def connect(url: str | None) -> Iterator["Client"]:
    """A client of the service at `url`. Errors of the connection become `AfterimageError`."""
    from service.client import Client

    url = url or options.URL
    with _errors(url), Client(url, _key()) as client:
        yield client


def decode_objects(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Decode with a `--source`, a `--target` or both."""
    data = b"" if args.source else read_bitstream(args.inputs[0])
    if args.target:
        return _decode_to_object(args, data, settings)
    output = _output(args)
    format = picture_format(output)
    with connect(args.url) as client:
        *_, last = client.decode(
            data, args.tier, format=format, previews=False, source=args.source, **settings
        )
    assert last.picture is not None
    write(output, last.picture)
    return 0


def _decode_to_object(args: argparse.Namespace, data: bytes, settings: Mapping[str, Any]) -> int:
    if settings["realism"] != 1:
        raise AfterimageError("--realism: only with --output; leave it out with --target")
    chosen = {name: value for name, value in settings.items() if name != "realism"}
    with connect(args.url) as client:
        for document in client.objects.decode(
            args.target, data, args.tier, source=args.source, **chosen
        ):
            if "status" in document:  # none of an instant picture
                note(f"{document['status']}: step {document['step']} of {document['total']}")
    note(f"{args.target}: written")
    return 0


def encode_objects(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Encode with a `--source`, a `--target` or both."""
    picture = b"" if args.source else read_picture(args.inputs[0])
    output = None if args.target else _output(args)
    with connect(args.url) as client:
        if output is None:
            client.objects.encode(args.target, picture, source=args.source, **settings)
            note(f"{args.target}: written")
        else:
            write(output, client.encode(picture, source=args.source, **settings))
    return 0


def _output(args: argparse.Namespace) -> Path:
    """The output file for an object. Raises `AfterimageError` if it is missing or a folder."""
    if not args.output or args.output.endswith("/") or Path(args.output).is_dir():
        raise AfterimageError("--output: name the file to write, or an object with --target")
    return Path(args.output)


def decode_files(
    args: argparse.Namespace, settings: Mapping[str, Any], targets: Mapping[Path, Path]
) -> int:
    """Decode files at the service `args.url`."""

    async def decode(client: "AsyncClient", source: Path, on_step: OnStep) -> bytes:
        data, format = read_bitstream(source), picture_format(targets[source])
        async for update in client.decode(
            data, args.tier, format=format, previews=False, **settings
        ):
            on_step(update.step, update.total)
        assert update.picture is not None
        return update.picture

    return _convert_files(args, targets, decode)


def encode_files(
    args: argparse.Namespace, settings: Mapping[str, Any], targets: Mapping[Path, Path]
) -> int:
    """Encode files at the service `args.url`."""

    async def encode(client: "AsyncClient", source: Path, on_step: OnStep) -> bytes:
        data = await client.encode(read_picture(source), **settings)
        on_step(0, 0)
        return data

    return _convert_files(args, targets, encode)


def _convert_files(args: argparse.Namespace, targets: Mapping[Path, Path], convert: Convert) -> int:
    with warnings.catch_warnings(), _errors(args.url):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: note(str(message))
        return anyio.run(_Files(args, targets, convert).run)


class _Files:
    """Converts files at a service, several at a time."""

    def __init__(
        self, args: argparse.Namespace, targets: Mapping[Path, Path], convert: Convert
    ) -> None:
        self.url, self.convert = args.url, convert
        self.left, self.count = iter([*targets.items()]), len(targets)
        self.workers = min(args.jobs, self.count)
        self.pace, self.failures = Pace(args.jobs), 0

    async def run(self) -> int:
        """Convert all files, and report those that fail; returns the exit status."""
        from tqdm import tqdm

        from service.client import AsyncClient

        unit, total = ("step", None) if self.count == 1 else ("file", self.count)
        async with AsyncClient(self.url, _key()) as self.client:
            with tqdm(total=total, unit=unit, leave=False, disable=None) as self.bar:
                if self.workers <= 1:
                    await self._work()
                else:
                    async with anyio.create_task_group() as group:
                        for _ in range(self.workers):
                            group.start_soon(self._work)
        return 1 if self.failures else 0

    async def _work(self) -> None:
        """Convert one file after the other."""
        from httpx import TransportError

        while (pair := next(self.left, None)) is not None:
            source, target = pair
            try:
                data = await self.pace.run(self.convert, self.client, source, self._on_step)
                self._write(target, data)
            except (TransportError, Refused) as e:
                self.left = iter(())  # all others would fail, too
                self._fail(f"{self.url}: {e}")
            except (AfterimageError, OSError) as e:
                self._fail(f"{source}: {reason(e)}")
            if self.count > 1:
                self.bar.update()

    def _write(self, target: Path, data: bytes) -> None:
        try:
            write(target, data)
        except OSError as e:
            if target == STDIO and isinstance(e, BrokenPipeError):
                raise
            raise AfterimageError(f"{target}: {reason(e)}") from e

    def _on_step(self, step: int, total: int) -> None:
        self.pace.accepted()
        if self.count == 1:
            self.bar.total = total or self.bar.total
            self.bar.update(max(step - self.bar.n, 0))

    def _fail(self, text: str) -> None:
        self.failures += 1
        complain(text)


def _key() -> str:
    return os.environ.get("AFTERIMAGE_API_KEY", "")


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Errors of the connection to `url` become `AfterimageError`."""
    from httpx import InvalidURL, TransportError

    try:
        yield
    except (TransportError, InvalidURL) as e:
        raise AfterimageError(f"{url}: {e}") from e
