"""The `afterimage` command."""

import concurrent.futures
import contextlib
import errno
import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from models import image
from models.codec import bitstream
from service.cli import codec, main
from service.cli.parser import TEXTS
from tests.support.data import DATA, PHOTO, psnr
from tests.support.forked import Forked
from tests.support.service import Service, children, fork_service
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.weights, pytest.mark.usefixtures("loaded_once")]


def run_process(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a new process."""
    command = [str(Path(sys.executable).with_name("afterimage")), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def afterimage(*args: object, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported torch already."""
    arguments = [str(a) for a in args]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ),
    ):
        try:
            code = main.main(arguments)
        except SystemExit as e:
            code = int(e.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(done: subprocess.CompletedProcess[str], message: str, status: int = 1) -> None:
    """Check the exit status, and that stderr has the message and no traceback."""
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def read(path: Path) -> image.Pixels:
    return image.read(path.read_bytes(), 10**6)


def test_encode_and_decode_a_photograph(tmp_path: Path, photo: image.Pixels) -> None:
    assert afterimage("encode", PHOTO, "-o", tmp_path / "a.msh", "-q", 3).returncode == 0
    assert afterimage("decode", tmp_path / "a.msh", "-o", tmp_path / "a.png").returncode == 0
    assert psnr(read(tmp_path / "a.png"), photo) > 31


def test_several_inputs_are_written_to_a_folder(tmp_path: Path, small: image.Pixels) -> None:
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(image.write(small, "png"))
    (tmp_path / "three.png").write_text("no picture")
    sources = [tmp_path / f"{n}.png" for n in ("one", "two", "three")]
    done = afterimage("encode", *sources, "-o", tmp_path / "out", "--format", "compressai")
    assert done.returncode == 1
    assert "three.png" in done.stderr
    bitstreams = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in bitstreams] == ["one.bin", "two.bin"]
    assert bitstream.parse(bitstreams[0].read_bytes()).format == "compressai"

    done = afterimage("decode", *bitstreams, "-o", tmp_path / "pictures", "--tier", "perceptual")
    assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / f"pictures/{name}.png") for name in ("one", "two"))
    assert np.array_equal(one, two)
    afterimage(
        "decode", bitstreams[0], "-o", tmp_path / "other.png", "--tier", "perceptual", "--seed", 9
    )
    assert not np.array_equal(one, read(tmp_path / "other.png"))


def test_options_override_sampler_settings_and_realism(tmp_path: Path, small: image.Pixels) -> None:
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    afterimage("encode", tmp_path / "a.png", "-o", tmp_path / "a.msh")
    source, out = tmp_path / "a.msh", tmp_path / "b.png"

    def decoded(*options: object) -> image.Pixels:
        done = afterimage("decode", source, "-o", out, "--tier", "ddim-10", *options)
        assert done.returncode == 0, done.stderr
        return read(out)

    solver = decoded("--sampler", "dpmpp-2m", "--steps", 3, "--guidance", 1.5)
    metadata = Image.open(out).text  # type: ignore[attr-defined]
    assert metadata["afterimage:sampler"].startswith("dpmpp-2m")
    assert (metadata["afterimage:steps"], metadata["afterimage:realism"]) == ("3", "1.0")
    instant, half = decoded("--realism", 0), decoded("--steps", 3, "--realism", 0.5).astype(int)
    afterimage("decode", source, "-o", out)
    assert np.array_equal(instant, read(out))
    drawn = decoded("--steps", 3).astype(int)
    assert np.abs(2 * half - drawn - instant).max() <= 2
    assert not np.array_equal(solver, drawn)
    for wrong in (("--realism", 2), ("--steps", 0), ("--guidance", -1)):
        refused(afterimage("decode", source, "-o", out, "--tier", "ddim-10", *wrong), wrong[0][2:])


def test_an_output_that_ends_with_a_slash_is_a_folder(tmp_path: Path, small: image.Pixels) -> None:
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    assert afterimage("encode", "a.png", "-o", "coded/", cwd=tmp_path).returncode == 0
    assert (tmp_path / "coded/a.msh").is_file()


def test_a_diffusion_picture_declares_synthesised_detail(tmp_path: Path, small_msh: bytes) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    done = afterimage("decode", "a.msh", "-o", "a.png", "--tier", "ddim-10", cwd=tmp_path)
    assert done.returncode == 0
    assert b"synthesised detail" in (tmp_path / "a.png").read_bytes()


def test_invalid_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_MAX_PIXELS", "many")
    refused(afterimage("inspect", DATA / "kodim23.msh"), "AFTERIMAGE_MAX_PIXELS is 'many'")
    monkeypatch.delenv("AFTERIMAGE_MAX_PIXELS")
    monkeypatch.setenv("AFTERIMAGE_CORS_ORIGINS", "a.example")
    refused(afterimage("inspect", DATA / "kodim23.msh"), "give origins such as https://a.example")
    monkeypatch.setenv("AFTERIMAGE_CORS_ORIGINS", "")
    assert afterimage("inspect", DATA / "kodim23.msh").returncode == 0


def test_inspect_prints_a_json_line_for_each_input_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "wrong.msh").write_text("wrong")
    good = DATA / "kodim23.msh"
    done = afterimage("inspect", good, "wrong.msh", "missing.msh", good, cwd=tmp_path)
    refused(done, "missing.msh: No such file")
    first, wrong, missing, last = map(json.loads, done.stdout.splitlines())
    assert first == last
    assert (first["width"], first["height"], first["decodable"]) == (768, 512, True)
    assert [first["file"], wrong["file"]] == [str(good), "wrong.msh"]
    assert wrong["error"]
    assert missing == {"file": "missing.msh", "error": "No such file or directory"}


def test_inspect_escapes_what_is_not_utf_8_in_the_name_of_a_file(tmp_path: Path) -> None:
    for name in (b"\xff.msh", "ü.msh".encode()):
        Path(tmp_path, os.fsdecode(name)).write_bytes(b"bad")
    done = run_process("inspect", os.fsdecode(b"\xff.msh"), "ü.msh", cwd=tmp_path)
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert json.loads(first)["file"] == os.fsdecode(b"\xff.msh")
    assert '"ü.msh"' in second or json.loads(second)["file"] == "ü.msh"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "--output is empty"),
        ("file/a.png", "file is not a folder"),
        ("loop", "Too many levels"),
    ],
)
def test_an_impossible_output_is_an_error(
    tmp_path: Path, small: image.Pixels, output: str, message: str
) -> None:
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    refused(afterimage("encode", "a.png", "-o", output, cwd=tmp_path), message)
    assert not (tmp_path / "a.msh").exists()


def redirected(arguments: tuple[str, ...], folder: str, source: str, target: str | None) -> int:
    """Run the command in `folder`, with files as stdin and stdout; without `target`, stdout is a
    pipe whose reader has gone."""
    os.chdir(folder)
    os.dup2(os.open(source, os.O_RDONLY), 0)
    if target is None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT), 1)
    sys.stdin = open(0)  # the fork server has closed its own
    return main.main(arguments)


def forked(
    *arguments: str, cwd: Path, source: str = os.devnull, target: str | None
) -> tuple[int, str]:
    """Run `redirected` in a process of its own; returns the exit status and stderr."""
    log = cwd / "stderr"
    run = functools.partial(redirected, arguments, str(cwd), source, target)
    status = Forked(run, os.environ, log).wait(300)
    return status, log.read_text()


def test_a_hyphen_is_stdin_and_stdout(tmp_path: Path, small: image.Pixels) -> None:
    """Real processes, because their stdout is the subject."""
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    encode = forked("encode", "-", "-o", "-", cwd=tmp_path, source="a.png", target="a.msh")
    assert encode == (0, "")
    assert bitstream.parse((tmp_path / "a.msh").read_bytes()).width == 150
    with (tmp_path / "a.msh").open("rb") as source:
        command = [sys.executable, "-P", "-m", "service.cli", "inspect", "-"]
        done = subprocess.run(command, stdin=source, capture_output=True)
    assert json.loads(done.stdout)["file"] == "-"
    (tmp_path / "b.png").touch()
    file = (tmp_path / "b.png").stat().st_ino
    decode = ("decode", "-", "-o", "/dev/stdout")
    status, _ = forked(*decode, cwd=tmp_path, source="a.msh", target="b.png")
    assert (tmp_path / "b.png").stat().st_ino == file  # not renamed over
    assert status == 0
    assert read(tmp_path / "b.png").shape == (100, 150, 3)


def test_a_reader_of_stdout_that_has_gone_ends_the_command_without_a_word(
    tmp_path: Path, small_msh: bytes
) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "service.cli", "inspect", "a.msh"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert forked("decode", "a.msh", "-o", "-", cwd=tmp_path, target=None) == (1, "")


def test_an_output_that_is_a_pipe_gets_the_picture(tmp_path: Path, small_msh: bytes) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    os.mkfifo(tmp_path / "pipe")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    done = afterimage("decode", "a.msh", "-o", "pipe", cwd=tmp_path)
    reader.join(60)
    assert done.returncode == 0, done.stderr
    assert image.read(received[0], 10**6).shape == (100, 150, 3)
    assert (tmp_path / "pipe").is_fifo()


def test_an_output_that_is_there_keeps_its_mode_and_a_link_its_target(
    tmp_path: Path, small: image.Pixels
) -> None:
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    (tmp_path / "private.msh").touch(0o600)
    (tmp_path / "link.msh").symlink_to("private.msh")
    assert afterimage("encode", "a.png", "-o", "link.msh", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.msh").is_symlink()
    assert bitstream.parse((tmp_path / "private.msh").read_bytes()).width == 150
    assert (tmp_path / "private.msh").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_inputs_are_checked_before_models_are_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = mock.Mock(side_effect=AssertionError("the models were loaded"))
    monkeypatch.setattr(codec, "without_garbage_collection", loading)
    (tmp_path / "folder").mkdir()
    for source, message in (
        ("missing", "missing: No such file or directory"),
        ("folder", "folder is a folder; name the files in it"),
    ):
        done = afterimage(command, source, "-o", "a.png", cwd=tmp_path)
        refused(done, message)
        assert "Errno" not in done.stderr


def test_inputs_that_share_an_output_are_both_named(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.msh").touch()
    done = afterimage("decode", "one/a.msh", "two/a.msh", "-o", "out/", cwd=tmp_path)
    refused(done, "one/a.msh and two/a.msh would both be written to out/a.png")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_output_that_cannot_be_written_is_named(
    number: int, tmp_path: Path, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    (tmp_path / "b.png").write_text("old")
    error = OSError(number, os.strerror(number), ".b.png.1234.part")
    monkeypatch.setattr(Path, "write_bytes", mock.Mock(side_effect=error))
    done = afterimage("decode", "a.msh", "-o", "b.png", cwd=tmp_path)
    refused(done, f"afterimage: b.png: {os.strerror(number)}")
    assert ".part" not in done.stderr
    assert (tmp_path / "b.png").read_text() == "old"
    assert {f.name for f in tmp_path.iterdir()} == {"a.msh", "b.png"}


def test_a_written_output_is_noted_on_stderr(tmp_path: Path, small_msh: bytes) -> None:
    (tmp_path / "a.msh").write_bytes(small_msh)
    done = afterimage("decode", "a.msh", "-o", "b.png", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("", 0)
    assert re.search(r"^b\.png: [\d,]+ bytes$", done.stderr, re.M)


def test_a_picture_is_not_decoded_and_a_bitstream_not_encoded(
    tmp_path: Path, small: image.Pixels, small_msh: bytes
) -> None:
    for name, format in (("a.png", "png"), ("a.webp", "webp"), ("a.avif", "avif")):
        (tmp_path / name).write_bytes(image.write(small, format))  # type: ignore[arg-type]
        wanted = "a picture, not a bitstream; `afterimage encode`"
        refused(afterimage("decode", name, "-o", "b.png", cwd=tmp_path), wanted)
        refused(afterimage("inspect", name, cwd=tmp_path), wanted)
    (tmp_path / "a.msh").write_bytes(small_msh)
    wanted = "a bitstream, not a picture; `afterimage decode`"
    refused(afterimage("encode", "a.msh", "-o", "b.msh", cwd=tmp_path), wanted)


def test_the_limit_of_pixels_is_named_with_its_variable(
    tmp_path: Path, small: image.Pixels, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_MAX_PIXELS", "100")
    (tmp_path / "a.msh").write_bytes(small_msh)
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    for args in (("decode", "a.msh", "-o", "b.png"), ("encode", "a.png", "-o", "b.msh")):
        refused(afterimage(*args, cwd=tmp_path), "the limit is 100 in all (AFTERIMAGE_MAX_PIXELS)")


def test_a_truncated_picture_is_encoded_with_a_note(tmp_path: Path, small: image.Pixels) -> None:
    data = image.write(small, "jpeg")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    done = afterimage("encode", "a.jpg", "-o", "a.msh", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "a.jpg: the picture is truncated: pixels are missing" in done.stderr


def test_an_animation_is_encoded_with_a_note_about_its_other_frames(
    tmp_path: Path, small: image.Pixels
) -> None:
    frames = [Image.fromarray(small), Image.fromarray(255 - small)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = afterimage("encode", "a.gif", "-o", "a.msh", cwd=tmp_path)
    assert done.returncode == 0
    assert "a.gif: it has 2 frames; only the first is encoded" in done.stderr


@pytest.mark.parametrize("command", TEXTS)
def test_the_help_of_each_command_has_examples_that_are_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = afterimage(*command.split()[1:], "--help")
    assert done.returncode == 0
    _, _, examples = done.stdout.partition("examples:\n")
    lines = examples.splitlines()
    assert lines
    for line in lines:
        _, _, arguments = line.partition("afterimage ")
        main._parser().parse_args(shlex.split(re.split("[|<]", arguments)[0]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("decode", "missing.msh", "-o", "a.png"), "No such file"),
        (("decode", "empty.msh", "-o", "a.png"), "empty"),
        (("decode", "empty.msh", "-o", "a.gif"), ".png, .jpg, .jpeg, .webp, .avif, .npy"),
        (("decode", "empty.msh", "-o", "a.png", "--seed", "-1"), "seed"),
        (("encode", "empty.msh", "-o", "empty.msh"), "overwritten"),
        (("encode", "empty.msh", "empty.msh", "-o", "x"), "twice"),
        (("encode", "empty.msh", "b.png", "-o", "empty.msh"), "folder"),
    ],
)
def test_wrong_arguments_are_an_error(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty.msh").touch()
    (tmp_path / "b.png").touch()
    refused(afterimage(*args, cwd=tmp_path), message)


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (("worker",), "REDIS_URL", 2),
        (("serve", "--workers", "-1"), "--workers", 1),
        (("serve", "--redis-url", "nonsense"), "redis", 1),
        (("decode", DATA / "kodim23.msh", "-o", "a.png", "--url", "http://a:b"), "http://a:b", 1),
    ],
)
def test_a_command_that_cannot_start_says_why(
    args: tuple[str, ...], message: str, status: int
) -> None:
    refused(run_process(*args), message, status)


def test_packages_in_the_current_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("worker", "models", "service"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('shadowed')")
    done = run_process("inspect", DATA / "kodim23.msh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def stop(service: Service, by: signal.Signals) -> None:
    """Send a signal; the exit status must be 0, and all child processes must exit."""
    left = children(service.process.pid)
    assert left
    service.process.send_signal(by)
    assert service.process.wait(30) == 0
    until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in left),
        "the exit of all child processes",
        10,
    )


@pytest.mark.redis
def test_a_stopped_service_leaves_no_process_and_keeps_its_queue(
    tmp_path: Path, small_msh: bytes
) -> None:
    params = {"tier": "perceptual"}
    with fork_service(tmp_path, "--workers", "0") as first:
        answer = first.client.post("/v1/decodes", params=params, content=small_msh)
        location = answer.headers["location"]
        assert first.client.get(location).json()["position"] == 0
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first.client.get, location, headers={"Prefer": "wait=60"})
            time.sleep(1)
            stop(first, signal.SIGINT)
        assert waiting.result().json()["status"] == "queued"  # the connection was not cut
    with fork_service(tmp_path) as second:
        assert wait_for(second.client, location)["status"] == "succeeded"
        stop(second, signal.SIGTERM)
