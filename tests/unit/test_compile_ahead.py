"""Compiling the entropy coder while weights are imported."""

from pathlib import Path

import pytest

from models.codec import compile_ahead


def test_what_the_first_decode_needs_is_compiled_beside_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    with compile_ahead.beside("bmshj2018-factorized"):
        pass
    names = {file.name.partition("-")[0] for file in tmp_path.rglob("*.nbc")}
    assert {"rans._decode", "rans._refill", "rans._bypass", "rans._bits"} <= names


def test_a_failed_import_does_not_wait_for_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    with pytest.raises(KeyError), compile_ahead.beside("cheng2020-attn"):
        raise KeyError
    assert not list(tmp_path.rglob("*.nbc"))
