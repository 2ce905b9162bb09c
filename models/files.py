"""Writing files: atomically, and to any kind of output that a user names."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_LINKS = 40
"""Number of symbolic links in a path, as in path_resolution(7)."""


@contextmanager
def atomic_write(file: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a new empty file in the folder of `file` to write to, then rename it to `file`.

    If the block raises, `file` stays unchanged and the new file is deleted. The new file has `mode`
    without the bits of the umask; `write_output` keeps the mode of an existing file.
    """
    # the name cannot be predicted, and is short even if that of `file` is as long as may be
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process has locked the folder, and lock it.

    The folder itself is locked: a lock file would stay behind.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_output(path: Path, data: bytes, new_mode: int = 0o666) -> None:
    """Write `data` to an output that a user named; a file that is not there yet gets `new_mode`.

    A regular file is replaced atomically and keeps its mode and owner; a symbolic link keeps
    pointing to it. If writing fails, it keeps its old content. Pipes, devices and open files of
    /proc, such as /dev/stdout, are written to directly, and so is a file that cannot be replaced:
    it is a mount point, belongs to another user, or lies in a folder that may not be written.
    Raises `OSError` that names `path`.
    """
    try:
        before = path.stat() if path.exists() else None
        if before is not None and is_special(path, before):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))  # a dangling link creates the file it names
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if before is None:
            with atomic_write(target, new_mode) as part:
                part.write_bytes(data)
        elif not os.access(target, os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif not _replace(target, data, before):
            target.write_bytes(data)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def is_special(path: Path, status: os.stat_result) -> bool:
    """True for what must not be renamed over, such as a pipe or /dev/stdout."""
    return not stat.S_ISREG(status.st_mode) or _is_open_file(path)


def _is_open_file(path: Path) -> bool:
    """True if the path leads to an open file of a process in /proc, as /dev/stdout does."""
    for _ in range(_MAX_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if path.is_relative_to("/proc"):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / os.readlink(path)
    return False


def _replace(target: Path, data: bytes, before: os.stat_result) -> bool:
    """Replace a file and keep its owner and mode; False if the system does not allow that."""
    try:
        with atomic_write(target, 0o600) as part:  # nobody else may read it before it has its mode
            part.write_bytes(data)
            status = part.stat()
            if (status.st_uid, status.st_gid) != (before.st_uid, before.st_gid):
                os.chown(part, before.st_uid, before.st_gid)
            part.chmod(stat.S_IMODE(before.st_mode))
    except OSError as e:
        if e.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}:
            return False
        raise
    return True
