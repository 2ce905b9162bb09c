"""Output paths of `afterimage encode` and `decode`, and the loop over their input files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import AfterimageError
from models.files import atomic_write
from service.cli.terminal import complain

if TYPE_CHECKING:  # importing it loads Pillow
    from models.image import OutputFormat


def output_paths(inputs: Sequence[Path], output: str, suffix: str) -> dict[Path, Path]:
    """Input file -> output file.

    `output` is a folder if one exists there, if it ends with / or if there are several inputs;
    files in it get the input's name with `suffix`. Raises `AfterimageError` if two inputs share an
    output, or if an input would be overwritten.
    """
    path = Path(output)
    if len(set(inputs)) < len(inputs):
        twice = next(source for source in inputs if list(inputs).count(source) > 1)
        raise AfterimageError(f"the input {twice} is given twice; name it once")
    if len(inputs) == 1 and not path.is_dir() and not output.endswith("/"):
        targets = {inputs[0]: path}
    else:
        if path.exists() and not path.is_dir():
            raise AfterimageError(
                f"the output {path} is a file, but must be a folder; choose another"
            )
        targets = {source: path / f"{source.stem}{suffix}" for source in inputs}
    if len(set(targets.values())) < len(targets):
        raise AfterimageError(
            f"{path}: several inputs have the same name and would be written to the same file; "
            "write them to different folders"
        )
    for source, target in targets.items():
        if source.resolve() == target.resolve():
            raise AfterimageError(
                f"{source} is an input and would be overwritten; choose another output"
            )
    return targets


def picture_format(target: Path) -> "OutputFormat":
    """Picture format of a file name. Raises `AfterimageError` for an unknown suffix."""
    from models.image import SUFFIXES

    try:
        return SUFFIXES[target.suffix.lower()]
    except KeyError:
        raise AfterimageError(
            f"{target}: unknown picture format {target.suffix!r}; choose {', '.join(SUFFIXES)}"
        ) from None


def convert_each(targets: dict[Path, Path], convert: Callable[[Path], bytes]) -> int:
    """Write `convert(source)` to the target of each source; returns the exit status.

    If a file fails, the error is printed to stderr and the next file is converted.
    """
    from tqdm import tqdm

    failures = 0
    for source, target in tqdm(targets.items(), unit="file", disable=None):
        try:
            write(target, convert(source))
        except (AfterimageError, OSError) as e:
            failures += 1
            complain(f"{source}: {e}")
    return 1 if failures else 0


def write(target: Path, data: bytes) -> None:
    """Write a file atomically; its folder is created if it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as part:
        part.write_bytes(data)
