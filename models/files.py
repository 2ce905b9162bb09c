"""Writing files: atomically, and to any kind of output that a user names."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a new empty file in the folder of `file` to write to, then rename it to `file`.

    If the block raises, `file` stays unchanged and the new file is deleted. An existing file is
    replaced together with its mode; `write_output` keeps the mode.
    """
    part = _create_beside(file)
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_output(path: Path, data: bytes) -> None:
    """Write `data` to an output that a user named.

    A regular file is replaced atomically and keeps its mode and owner; a symbolic link keeps
    pointing to it. Pipes, devices and the files of /proc and /dev are written to directly. If
    writing fails, a regular file keeps its old content. Raises `OSError` that names `path`.
    """
    try:
        before = path.stat() if path.exists() else None
        if before is not None and is_special(path, before):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))  # a dangling link creates the file it names
        with atomic_write(target) as part:
            part.write_bytes(data)
            if before is not None:
                _copy_access(before, part)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def _create_beside(file: Path) -> Path:
    """Create a hidden file in the same folder, with a name that nobody can predict."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    return part


def is_special(path: Path, status: os.stat_result) -> bool:
    """True for what must not be renamed over, such as a pipe or /dev/stdout."""
    return not stat.S_ISREG(status.st_mode) or str(path.absolute()).startswith(("/dev/", "/proc/"))


def _copy_access(before: os.stat_result, part: Path) -> None:
    """Give `part` the owner and the mode of the file that it replaces.

    Only root may change the owner; for other users the new file belongs to them.
    """
    if os.geteuid() == 0:
        os.chown(part, before.st_uid, before.st_gid)
    part.chmod(stat.S_IMODE(before.st_mode))
