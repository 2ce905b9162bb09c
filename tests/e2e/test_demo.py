"""`make demo` with a running service, and with wrong arguments."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from models import image
from service.cli import demo
from tests.support.data import ROOT
from tests.support.service import Service, free_port

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def run(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the demo in a new process."""
    command = [sys.executable, "-P", "-m", "service.cli.demo", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def call(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the demo in this process."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["demo", *map(str, args)]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", arguments),
    ):
        status = demo.main()
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_the_demo_prints_a_table_and_saves_side_by_side_pictures(
    service: Service, small: image.Pixels, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated, as phones store portrait photographs
    Image.fromarray(small).save(tmp_path / "my phone.jpg", exif=exif, quality=95)
    url = str(service.client.base_url)
    for runs in (run, call):  # the second run uses the cache
        done = runs(tmp_path, "my phone.jpg", "--url", url)
        assert done.returncode == 0, done.stderr
        assert "{" not in done.stderr  # no line of a log
    rows = re.findall(r"([123])  (JPEG|instant|perceptual) +([\d,]+) +([\d.]+)", done.stdout)
    names = ("JPEG", "instant", "perceptual")
    assert [r[:2] for r in rows] == [(q, name) for q in "123" for name in names]
    assert all(15 < float(psnr) < 45 for *_, psnr in rows)
    assert "PSNR in dB: higher" in done.stdout
    sheets = sorted((tmp_path / "demo-out").iterdir())
    assert [s.name for s in sheets] == [f"my phone-q{q}.png" for q in (1, 2, 3)]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 4 * 500


def test_a_wrong_argument_is_an_error_of_one_line(tmp_path: Path, small: image.Pixels) -> None:
    (tmp_path / "photo.png").write_bytes(image.write(small, "png"))
    (tmp_path / "text.md").write_text("no picture")
    dead = f"http://127.0.0.1:{free_port()}"
    for runs, args, message in (
        (run, ["nothing.png"], "nothing.png: No such file or directory"),
        (call, ["text.md"], "text.md: the file is not a picture in a known format"),
        (call, ["."], ".: Is a directory"),
        (call, ["photo.png", "--url", dead], f"no service answers at {dead}"),
    ):
        done = runs(tmp_path, *args)
        assert done.returncode == 1
        assert done.stderr.startswith(f"afterimage: {message}")
        assert done.stderr.count("\n") == 1


def test_make_passes_a_photograph_whose_name_has_a_space() -> None:
    command = ["make", "-n", "demo", "PHOTO=my photo.png", "URL=http://host", "READY="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert '-m service.cli.demo "my photo.png" --url "http://host"' in done.stdout


def test_the_demos_own_service_has_its_own_queue_folder_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("AFTERIMAGE_API_KEYS", "keys.toml")
    started: list[dict[str, str]] = []

    class Process:
        def __init__(self, _command: object, *, env: dict[str, str], **_: object) -> None:
            started.append(env)

        def terminate(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr("subprocess.Popen", wrap(subprocess.Popen, Process))
    monkeypatch.setattr(demo, "_ready", lambda _process, url, _log: url)
    with demo._service(tmp_path / "cache", tmp_path / "service.log") as url:
        assert url.startswith("http://127.0.0.1:")
    (environment,) = started
    assert environment["REDIS_URL"].startswith("unix://")
    assert not (tmp_path / "cache/queue").exists()
    assert environment["AFTERIMAGE_CACHE_DIR"] == str(tmp_path / "cache/demo")
    assert "AFTERIMAGE_API_KEYS" not in environment


def wrap(real: type, fake: type) -> object:
    """`fake` for the command `afterimage serve`, `real` for others, such as Redis."""
    return lambda command, **options: (fake if "serve" in command else real)(command, **options)
