"""Folders that other users could change are refused, and no code from them is run."""

import grp
import os
import pickle
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import checked_files, folders
from models.codec import catalogue
from models.folders import UntrustedFolder
from service.cli.main import main
from worker.queue import private_redis
from worker.settings import WorkerSettings, prepare_process

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.private(tmp_path / "a/b")


def become_foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `path` belong to another user.

    Only root can change its owner. Without root, this process takes another user's id in place:
    then all that it has made belongs to another user.
    """
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)


def test_a_folder_and_its_parents_are_created_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folders.private(tmp_path / "a/b/c")
    finally:
        os.umask(before)
    for made in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / made).stat().st_mode) == 0o700


@pytest.mark.parametrize("path", [".", "a", "a/b", "a/b/file", "a/b/sub", "a/b/sub/file"])
def test_a_path_that_contains_anything_of_another_user_is_refused(
    folder: Path, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sub").mkdir()
    for file in (folder / "file", folder / "sub/file"):
        file.touch()
    folders.check(folder)
    become_foreign(tmp_path / path, monkeypatch)
    with pytest.raises(UntrustedFolder, match="not safe: .* belongs to the user") as e:
        folders.check(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["a", "a/b", "a/b/file", "a/b/sub"])
def test_anything_that_every_user_may_write_is_refused(folder: Path, path: str) -> None:
    (folder / "sub").mkdir()
    (folder / "file").touch()
    written = folder.parent.parent / path
    written.chmod(0o777)
    with pytest.raises(UntrustedFolder, match=f"every user may write {written}, .* `chmod go-w"):
        folders.check(folder)
    written.chmod(0o755)
    folders.check(folder)


def test_a_folder_within_a_sticky_folder_is_accepted_but_not_the_sticky_folder_itself(
    folder: Path,
) -> None:
    folder.parent.chmod(0o1777)
    folders.check(folder)
    folders.check(folder.parent / "missing")
    folders.check_parent(folder.parent)
    with pytest.raises(UntrustedFolder):
        folders.check(folder.parent)


def test_links_in_the_path_are_followed_and_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others could change a link in a folder that they may write."""
    public = tmp_path / "public"
    public.mkdir()
    (public / "link").symlink_to(Path("..") / "second")
    (tmp_path / "second").symlink_to(folder)
    folders.check(public / "link")
    public.chmod(0o777)
    with pytest.raises(UntrustedFolder, match=f"may write {public}, "):
        folders.check(public / "link")
    public.chmod(0o755)
    if os.geteuid() == 0:
        os.lchown(tmp_path / "second", NOBODY, NOBODY)
        with pytest.raises(UntrustedFolder, match="second belongs to"):
            folders.check(public / "link")


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="links"):
        folders.check(tmp_path / "a")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A user database of two users, `ours` and `other`."""

    class Group:
        def __init__(self, name: str, *members: str) -> None:
            self.gr_name, self.gr_mem = name, list(members)

    class User:
        pw_name = "ours"

    known = {50: Group("ours"), 60: Group("ours", "other"), 70: Group("users", "ours")}
    monkeypatch.setattr(grp, "getgrgid", lambda gid: known[gid])
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: User())
    monkeypatch.setattr(os, "getegid", lambda: 50)
    monkeypatch.setattr(os, "getgroups", lambda: [70, 2000])
    yield monkeypatch


@pytest.mark.parametrize(
    ("gid", "accepted"), [(0, True), (50, True), (60, False), (70, False), (2000, True), (9, False)]
)
def test_a_group_may_write_if_only_this_user_and_root_are_in_it(
    groups: pytest.MonkeyPatch, gid: int, accepted: bool
) -> None:
    """0: OpenShift. 50: the user's own group. 2000: the nameless group of a Kubernetes volume."""
    status = os.stat_result((0o40775, 1, 1, 2, os.geteuid(), gid, 0, 0, 0, 0))
    assert folders.is_trusted(status) == accepted


def test_a_volume_in_kubernetes_may_be_writable_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An `emptyDir` has the mode 0777, belongs to root and is seen by one pod only."""
    mounted = os.stat_result((0o42777, 1, 1, 2, 0, 2000, 0, 0, 0, 0))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == "/var/cache/afterimage")
    monkeypatch.setattr(os, "lstat", lambda path: mounted)
    volume, other = Path("/var/cache/afterimage"), Path("/var/cache")
    for place, kubernetes, accepted in (
        (volume, True, True), (volume, False, False), (other, True, False)
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            if kubernetes:
                patch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
            else:
                patch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
            assert folders._is_volume(place, mounted) == accepted


class Exploit:
    """Creates a file when it is unpickled, as compiled code in the cache is."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.marker), "w")


USE = """
from worker.settings import WorkerSettings, prepare_process
prepare_process(WorkerSettings())
from models.codec import rans
print(rans._raw(7, 5))
"""
"""Prepares a process as all commands do, then uses compiled code."""


def test_compiled_code_in_the_cache_of_another_user_is_not_run(tmp_path: Path) -> None:
    cache, marker = tmp_path / "cache", tmp_path / "code-has-run"
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment["AFTERIMAGE_CACHE_DIR"] = str(cache)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-P", *command]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True)

    assert run("-c", USE).stdout == "4\n"
    for file in cache.rglob("*.nbc"):
        stamp = checked_files.read(file)[:32]  # type: ignore[index]
        checked_files.write(file, stamp + pickle.dumps(Exploit(marker)))
    (cache / "numba").chmod(0o777)
    command = run("-m", "service.cli", "inspect", "tests/data/kodim23.msh")
    assert (command.returncode, marker.exists()) == (1, False)
    assert f"{cache / 'numba'} is not safe: every user may write" in command.stderr
    assert command.stderr.count("\n") == 1
    environment["REDIS_URL"] = "redis://127.0.0.1:1"
    worker = run("-m", "worker.main")
    assert (worker.returncode, marker.exists()) == (1, False)
    assert "the worker cannot start" in worker.stderr and "is not safe" in worker.stderr
    assert "Traceback" not in worker.stderr
    (cache / "numba").chmod(0o700)  # what the check prevents: the same files in a folder of ours
    run("-c", USE)
    assert marker.exists()


def test_a_foreign_cache_or_weights_folder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("numba", "openvino", "spool", "queue", "alive"):
        cache = tmp_path / f"cache-{name}"
        folders.private(cache / name).chmod(0o777)
        with monkeypatch.context() as patch:
            patch.setenv("AFTERIMAGE_CACHE_DIR", str(cache))
            patch.delenv("NUMBA_CACHE_DIR")
            with pytest.raises(UntrustedFolder, match=f"{name} is not safe"):
                prepare_process(WorkerSettings())
    weights = folders.private(tmp_path / "weights")
    (weights / catalogue.MANIFEST).touch()
    weights.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path / "cache"))
        patch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(weights))
        assert main(["weights", "list"]) == 1
    error = capsys.readouterr().err
    assert "weights is not safe: every user may write" in error and error.count("\n") == 1
    with pytest.raises(UntrustedFolder):
        catalogue.imported(weights)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name is short enough for sockets; that of `tmp_path` may not be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def test_sockets_and_data_of_the_private_redis_are_not_in_a_folder_of_others(
    tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = folders.private(short_folder / "shared")
    shared.chmod(0o777)
    with pytest.raises(UntrustedFolder, match="every user"), private_redis.servers(shared):
        pass
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    with pytest.raises(UntrustedFolder, match="every user"), private_redis.servers(tmp_path / "a"):
        pass
    shared.chmod(0o1777)  # as /tmp
    with private_redis.servers(tmp_path / "a") as urls:
        assert str(shared) in urls[0]
