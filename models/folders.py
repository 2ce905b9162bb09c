"""Folders whose files are trusted: no other user may change, replace or add any of them.

Compiled code that is cached in a folder runs in this process, and pictures and weights in a folder
are served. Other users are all but this process's user and root.
"""

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from models.errors import AfterimageError

MAX_LINKS = 40
"""Number of symbolic links in a path, as in path_resolution(7)."""
_IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Environment variable that every container of a pod has."""


class UntrustedFolder(AfterimageError):
    """Another user could change, replace or add files in a folder."""


def private(folder: Path, mode: int = 0o700) -> Path:
    """Create a folder and its parents, with `mode`, unless they exist; check it; return it.

    Raises `UntrustedFolder`, and `OSError` if it cannot be created.
    """
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(mode, exist_ok=True)
    check(folder)
    return folder


def check(folder: Path, recursive: bool = True) -> None:
    """Raise `UntrustedFolder` if another user could change the folder, or has put files there.

    Files in subfolders are checked if `recursive`.

    A folder that is missing, or that this process may not read, holds nothing to trust. Its parents
    are checked too, since who may rename a folder can put another in its place. Parents that all
    may write, such as /tmp, are accepted if their sticky bit is set.
    """
    _check_path(folder, may_be_sticky=False)
    for place, status in _contents(folder, recursive):
        _check_owner(place, status, folder)
        _check_mode(place, status, folder, may_be_sticky=False)


def check_parent(folder: Path) -> None:
    """Raise `UntrustedFolder` if another user could replace a folder that this process makes here.

    Unlike `check`, accepts folders that all may write and whose sticky bit is set, such as /tmp.
    """
    _check_path(folder, may_be_sticky=True)


def _check_path(folder: Path, may_be_sticky: bool) -> None:
    end = Path(os.path.realpath(folder))
    for place, status in _steps(folder):
        _check_owner(place, status, folder)
        _check_mode(place, status, folder, may_be_sticky or place != end)


def is_trusted(status: os.stat_result) -> bool:
    """True for a file that only this process's user and root may change."""
    return status.st_uid in {os.geteuid(), 0} and not _writers(status)


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Folders and symbolic links from the root to `path`, followed as the kernel does.

    Ends before the first that is missing. Raises `OSError` for too many links.
    """
    place, rest, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    yield place, place.lstat()
    while rest:
        part = rest.pop()
        step = place.parent if part == ".." else place / part
        try:
            status = step.lstat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            place = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        place = Path("/") if target.is_absolute() else place
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _contents(folder: Path, recursive: bool) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything in a folder that can be read. Links are not followed."""
    for parent, subfolders, files in os.walk(folder):
        for name in (*subfolders, *files):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # or it was just removed
                yield Path(parent, name), Path(parent, name).lstat()
        if not recursive:
            return


def _check_owner(place: Path, status: os.stat_result, folder: Path) -> None:
    if status.st_uid not in {os.geteuid(), 0}:
        raise UntrustedFolder(
            f"{folder} is not safe: {place} belongs to the user {_user(status.st_uid)}, who could "
            "run code or forge files here; use another folder, or change the owner to "
            f"{_user(os.geteuid())}"
        )


def _check_mode(place: Path, status: os.stat_result, folder: Path, may_be_sticky: bool) -> None:
    writers = _writers(status)
    if not writers or stat.S_ISLNK(status.st_mode):  # the mode of a link has no meaning
        return
    if may_be_sticky and status.st_mode & stat.S_ISVTX:
        return
    if not _is_volume(place, status):
        raise UntrustedFolder(
            f"{folder} is not safe: {writers} may write {place}, run code and forge files here; "
            f"use another folder, or `chmod go-w {place}`"
        )


def _writers(status: os.stat_result) -> str:
    """Other users that may write, in words; empty if there are none."""
    if status.st_mode & stat.S_IWOTH:
        return "every user"
    if status.st_mode & stat.S_IWGRP and _has_other_members(status.st_gid):
        return f"the group {_group(status.st_gid)}"
    return ""


def _has_other_members(gid: int) -> bool:
    """Whether a group may have other members than this process's user and root.

    Accepted are root's group, in which OpenShift runs containers; a group of this process without a
    name, as that of a volume in Kubernetes (`fsGroup`); and the user's own group, which has the
    user's name.
    """
    if gid == 0:
        return False
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return gid not in {os.getegid(), *os.getgroups()}
    user = _user(os.geteuid())
    return group.gr_name != user or not {user, "root"}.issuperset(group.gr_mem)


def _is_volume(place: Path, status: os.stat_result) -> bool:
    """True for the root of a volume in Kubernetes, which makes some of them writable for all.

    Only the containers of the pod see it.
    """
    return _IN_KUBERNETES in os.environ and status.st_uid == 0 and os.path.ismount(place)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
