"""What `make` checks before it downloads anything."""

import builtins
import platform
import shutil
import sys
from pathlib import Path

import pytest

from deploy import check_setup

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13), (3, 14, 0)])
def test_another_python_is_refused(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    said = ".".join(map(str, version))
    assert f"needs Python 3.11, 3.12 or 3.13, and this is {said}" in check_setup.fault()  # type: ignore[no-untyped-call]


def test_a_python_without_venv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name == "ensurepip":
            raise ImportError("No module named 'ensurepip'")
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    assert "ensurepip': install the system's package" in check_setup.fault()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("machine", "compiler", "fits"),
    [("x86_64", None, True), ("aarch64", None, False), ("aarch64", "/usr/bin/g++", True)],
)
def test_a_compiler_is_needed_only_where_there_is_no_wheel(
    machine: str, compiler: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    monkeypatch.setattr(shutil, "which", lambda name: compiler if name == "g++" else None)
    fault = check_setup.fault()  # type: ignore[no-untyped-call]
    assert fault is None if fits else "no C++ compiler" in fault
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))  # CompressAI is not installed
    assert check_setup.fault() is None  # type: ignore[no-untyped-call]


def test_make_checks_python_before_it_makes_or_downloads_anything() -> None:
    recipe = MAKEFILE.read_text().partition("$(READY): pyproject.toml\n")[2].partition("\n\n")[0]
    order = [recipe.index(word) for word in ("check_setup.py", "6.5 GB", "-m venv", "pip install")]
    assert order == sorted(order)
    assert "--clear" in recipe and "--quiet" not in recipe
