"""Atomic file writes, and outputs of every kind."""

import os
import stat
import threading
from pathlib import Path

import pytest

from models.files import atomic_write, write_output


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


def test_an_output_in_proc_is_written_directly(tmp_path: Path) -> None:
    """As /dev/stdout is, when the shell has redirected it to a file."""
    with (tmp_path / "a").open("wb") as out:
        write_output(Path(f"/proc/self/fd/{out.fileno()}"), b"new")
        assert os.fstat(out.fileno()).st_nlink == 1
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_output_that_cannot_be_written_is_named_and_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing/a.msh'$") as e:
        write_output(tmp_path / "missing/a.msh", b"new")
    assert ".part" not in str(e.value)


def test_the_temporary_file_of_a_write_cannot_be_predicted(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "a") as part:
            names.add(part.name)
    assert len(names) == 2
