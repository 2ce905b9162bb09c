"""Atomic file writes, and outputs of every kind."""

import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.files import atomic_write, locked, write_output


def test_the_file_is_replaced_when_the_block_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("old")
    with atomic_write(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(file) as part:
        part.write_text("ne")
        raise OSError("the disk is full")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_output_keeps_the_mode_and_owner_of_the_file_it_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a.msh"
    file.write_text("old")
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 1234, 2345)
    before = file.stat()
    write_output(file, b"new")
    after = file.stat()
    assert file.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode, before.st_uid, before.st_gid
    )  # fmt: skip


def test_a_new_output_has_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_output(tmp_path / "a.msh", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.msh").stat().st_mode) == 0o640


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    if exists:
        (folder / "real").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("other/real")
    write_output(link, b"new")
    assert link.is_symlink()
    assert (folder / "real").read_bytes() == b"new"
    assert [f.name for f in folder.iterdir()] == ["real"]


def test_an_output_that_is_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"new")
    reader.join(10)
    assert received == [b"new"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("place", ["/proc/self/fd", "/dev/fd", "link"])
def test_an_open_file_in_proc_is_written_directly(tmp_path: Path, place: str) -> None:
    """As /dev/stdout is, when the shell has redirected it to a file."""
    with (tmp_path / "a").open("wb") as out:
        path = Path(place, str(out.fileno()))
        if place == "link":
            path = tmp_path / "link"
            path.symlink_to(f"/dev/fd/{out.fileno()}")
        write_output(path, b"new")
        assert os.fstat(out.fileno()).st_nlink == 1
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_regular_file_under_dev_is_replaced_atomically() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder, "a")
        file.write_text("old")
        with file.open("rb") as reader:
            write_output(file, b"new")
            assert reader.read() == b"old"


@contextmanager
def another_user() -> Iterator[Path]:
    """Run as a user without rights; yields a folder of root that others may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.setegid(4321)
        os.seteuid(4321)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)
            os.setegid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
@pytest.mark.parametrize("reason", ["folder", "owner"])
def test_a_file_that_cannot_be_replaced_is_overwritten(reason: str) -> None:
    with another_user() as folder:
        os.seteuid(0)
        file = folder / "a"
        file.write_text("old text")
        file.chmod(0o666)
        if reason == "owner":
            folder.chmod(0o777)
        before = file.stat()
        os.seteuid(4321)
        write_output(file, b"new")
        after = file.stat()
        assert file.read_bytes() == b"new"
        assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, 0)
        assert list(folder.iterdir()) == [file]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
def test_a_file_that_may_not_be_written_is_not_replaced() -> None:
    with another_user() as folder:
        os.seteuid(0)
        folder.chmod(0o777)
        os.seteuid(4321)
        file = folder / "a"
        file.write_text("old")
        file.chmod(0o444)
        with pytest.raises(PermissionError, match="Permission denied: '.*/a'$"):
            write_output(file, b"new")
        assert file.read_text() == "old"


def test_nobody_else_can_read_a_private_output_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    file.chmod(0o600)
    write, modes = Path.write_bytes, []

    def watching(path: Path, data: bytes) -> int:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", watching)
    write_output(file, b"new")
    assert modes == [0o600]


def test_a_new_output_can_be_made_private(tmp_path: Path) -> None:
    write_output(tmp_path / "a", b"new", 0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_folder_is_locked_for_one_thread_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    with locked(tmp_path):
        other = threading.Thread(target=lambda: _append_locked(tmp_path, order))
        other.start()
        other.join(0.05)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def _append_locked(folder: Path, order: list[str]) -> None:
    with locked(folder):
        order.append("second")


def test_an_output_that_cannot_be_written_is_named_and_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing/a.msh'$") as e:
        write_output(tmp_path / "missing/a.msh", b"new")
    assert ".part" not in str(e.value)


def test_an_output_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    write_output(tmp_path / ("a" * 255), b"new")
    assert (tmp_path / ("a" * 255)).read_bytes() == b"new"


def test_an_output_that_is_a_link_to_itself_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links: '.*/a'"):
        write_output(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()


def test_the_temporary_file_of_a_write_cannot_be_predicted(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "a") as part:
            names.add(part.name)
    assert len(names) == 2
