"""Inputs and outputs of `afterimage encode`, `decode` and `inspect`; `-` is stdin and stdout."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models.codec import bitstream
from models.errors import AfterimageError, PictureError, UnsupportedCodec
from models.files import is_special, write_output
from models.pictures.output_formats import SUFFIXES, OutputFormat
from service.cli.terminal import complain, note

STDIO = Path("-")
"""As an input stdin, as an output stdout."""


def output_paths(
    inputs: Sequence[Path], output: str | None, suffix: str, within: Sequence[str] = ()
) -> dict[Path, Path]:
    """Input file -> output file.

    `output` is a folder if one exists there, if it ends with / or if there are several inputs;
    files in it get the input's name with `suffix`. With the suffixes `within`, inputs may be
    folders: their files with these suffixes are taken, and keep their places below the folder.
    Raises `AfterimageError` if an input cannot be read, two inputs share an output, or an input
    would be overwritten.
    """
    if not output:
        fault = "--output is missing" if output is None else "--output is empty"
        raise AfterimageError(f"{fault}; name a file or a folder")
    if not inputs:
        raise AfterimageError("there is no input; name files")
    path = Path(output)
    if len(set(inputs)) < len(inputs):
        twice = next(source for source in inputs if list(inputs).count(source) > 1)
        raise AfterimageError(f"the input {twice} is given twice; name it once")
    names = _names(inputs, within)
    folder = [*names] != [*inputs] or len(names) > 1 or path.is_dir() or output.endswith("/")
    if not folder:
        targets = {inputs[0]: path}
    elif STDIO in (*inputs, path):
        raise AfterimageError("'-' is stdin or stdout; use it with one input and one output file")
    elif path.exists() and not path.is_dir():
        raise AfterimageError(f"the output {path} is a file, but must be a folder; choose another")
    else:
        targets = {
            source: path / name.with_name(f"{name.stem}{suffix}") for source, name in names.items()
        }
    _check_targets(targets)
    return targets


def _names(inputs: Sequence[Path], within: Sequence[str]) -> dict[Path, Path]:
    """Input file -> its name, or its path below the input folder."""
    names: dict[Path, Path] = {}
    for source in inputs:
        if within and source.is_dir():
            found = [f for f in sorted(source.rglob("*")) if f.suffix.lower() in within]
            if not found:
                raise AfterimageError(f"{source} has no files that end with {', '.join(within)}")
            names |= {file: file.relative_to(source) for file in found if file.is_file()}
        else:
            _check_input(source)
            names[source] = Path(source.name)
    return names


def without_existing(targets: Mapping[Path, Path]) -> dict[Path, Path]:
    """Leave out inputs whose output exists. Outputs are written at once, so it is complete."""
    left = {source: target for source, target in targets.items() if not target.exists()}
    if skipped := len(targets) - len(left):
        note(f"{skipped} of {len(targets)} outputs exist and are skipped")
    return left


def _check_input(source: Path) -> None:
    """Raise `AfterimageError` unless the input can be opened, before any model is loaded."""
    if source == STDIO:
        return
    if source.is_dir():
        raise AfterimageError(f"{source} is a folder; name the files in it, as in {source}/*")
    try:
        if source.is_file():
            source.open("rb").close()
        else:
            source.stat()
    except OSError as e:
        raise AfterimageError(f"{source}: {e.strerror}") from e


def _check_targets(targets: dict[Path, Path]) -> None:
    sources: dict[Path, Path] = {}
    for source, target in targets.items():
        other = sources.setdefault(target, source)
        if other != source:
            raise AfterimageError(
                f"{other} and {source} would both be written to {target}; "
                "write them to different folders"
            )
        if source != STDIO and os.path.realpath(source) == os.path.realpath(target):
            raise AfterimageError(
                f"{source} is an input and would be overwritten; choose another output"
            )


def read_input(source: Path) -> bytes:
    """Read an input file, or stdin for `-`."""
    return sys.stdin.buffer.read() if source == STDIO else source.read_bytes()


def read_bitstream(source: Path) -> bytes:
    """Read a bitstream. Raises `UnsupportedCodec` if the file is a picture."""
    data = read_input(source)
    if bitstream.picture_format(data):
        raise UnsupportedCodec("this is a picture, not a bitstream; `afterimage encode` makes one")
    return data


def read_picture(source: Path) -> bytes:
    """Read a picture file. Raises `PictureError` if the file is a bitstream."""
    data = read_input(source)
    if data.startswith(bitstream.MAGIC):
        raise PictureError("this is a bitstream, not a picture; `afterimage decode` makes one")
    return data


def note_frames(source: Path, data: bytes) -> None:
    """Print a note to stderr if a picture file has several frames: only the first is encoded."""
    from PIL import Image

    with contextlib.suppress(OSError, EOFError, ValueError, SyntaxError):
        with Image.open(io.BytesIO(data)) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # a JPEG with previews, as phones write
                note(f"{source}: it has {frames} frames; only the first is encoded")


def reason(error: Exception) -> str:
    """The text of an error; that of an `OSError` without the file's name and the error number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def picture_format(target: Path) -> OutputFormat:
    """Picture format of a file name; PNG for stdout, and for devices and pipes without a suffix.

    Raises `AfterimageError` for an unknown suffix.
    """
    if target == STDIO:
        return "png"
    if not target.suffix and target.exists() and is_special(target, target.stat()):
        return "png"
    try:
        return SUFFIXES[target.suffix.lower()]
    except KeyError:
        raise AfterimageError(
            f"{target}: unknown picture format {target.suffix!r}; end the name with "
            f"{', '.join(SUFFIXES)}, or with / for a folder"
        ) from None


def convert_each(targets: dict[Path, Path], convert: Callable[[Path], bytes]) -> int:
    """Write `convert(source)` to the target of each source; returns the exit status.

    Prints a line for each output to stderr. A file that fails is reported there, and the remaining
    files are converted.
    """
    from tqdm import tqdm

    failures = 0
    for source, target in tqdm(targets.items(), unit="file", disable=None):
        try:
            data = convert(source)
        except (AfterimageError, OSError) as e:
            failures += 1
            complain(f"{source}: {reason(e)}")
            continue
        try:
            write(target, data)
        except OSError as e:
            if target == STDIO and isinstance(e, BrokenPipeError):
                raise
            failures += 1
            complain(f"{target}: {reason(e)}")
    return 1 if failures else 0


def write(target: Path, data: bytes) -> None:
    """Write an output, or stdout for `-`; its folder is created if it is missing."""
    if target == STDIO:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise NotADirectoryError(errno.ENOTDIR, f"{target.parent} is not a folder") from e
    write_output(target, data)
    note(f"{target}: {len(data):,} bytes")
