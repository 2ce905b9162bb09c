"""The cache of functions that numba compiles."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from numba.core import config

from models.codec.compiled import _Files, compiled


def double(x: int) -> int:
    return 2 * x


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Compiles `double`, as another process that uses the same cache would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
        config.reload_config()  # type: ignore[no-untyped-call]
        yield lambda: compiled()(double)
    config.reload_config()  # type: ignore[no-untyped-call]


def cached(folder: Path) -> Path:
    """The only file in the cache."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 1, (
        "numba does not use the cache of models/codec/compiled.py: has `Dispatcher._cache`, or the "
        "interface of `FunctionCache` and `IndexDataCacheFile`, changed?"
    )
    return files[0]


def test_compiled_code_is_written_once_and_loaded_by_others(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    assert make()(21) == 42
    before = cached(tmp_path).stat()
    assert before.st_mode & 0o077 == 0
    again = make()
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1
    assert cached(tmp_path).stat().st_ino == before.st_ino


def test_each_signature_has_a_file(make: Callable[[], Any], tmp_path: Path) -> None:
    assert (make()(21), make()(0.5)) == (42, 1.0)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    again = make()
    assert (again(21), again(0.5)) == (42, 1.0)
    assert sum(again.stats.cache_hits.values()) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "header", "empty"])
def test_damaged_compiled_code_is_not_run_but_made_again(
    make: Callable[[], Any], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert make()(21) == 42
    file = cached(tmp_path)
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes({
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut": data[:-1],
        "header": data[:20],
        "empty": b"",
    }[damage])  # fmt: skip
    found = make()
    assert found(21) == 42
    assert sum(found.stats.cache_hits.values()) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{file} is damaged" in caplog.text
    again = make()
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_code_of_another_source_is_not_loaded_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (_Files(tmp_path, "double", ("0.60", mtime)) for mtime in (1, 2))
    old.save(("int64",), "old code")
    assert old.load(("int64",)) == "old code"
    assert new.load(("int64",)) is None
    new.save(("int64",), "new code")
    assert new.load(("int64",)) == "new code"
    assert old.load(("int64",)) is None
    assert len(list(tmp_path.iterdir())) == 1
    assert not caplog.records
