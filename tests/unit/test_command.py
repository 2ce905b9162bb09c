"""The end of the process of a command."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import atexit, sys
from service.cli import main
atexit.register(print, "handler")
sys.argv = ["afterimage", "weights", *sys.argv[1:]]
main.run()
"""


@pytest.mark.parametrize(("arguments", "status"), [(["list"], 0), (["remove", "none"], 1)])
def test_a_command_ends_with_its_status_after_handlers_and_output(
    arguments: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == status
    assert ended.stdout.splitlines()[-1] == "handler"
    assert ("msh" in ended.stdout) == (status == 0)
    assert ("no imported weights" in ended.stderr) == (status == 1)
