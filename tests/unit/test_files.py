"""Atomic file writes."""

from pathlib import Path

import pytest

from models.files import atomic_write


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
