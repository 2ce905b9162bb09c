"""`afterimage encode` and `decode` let a service convert folders of files."""

import time
from pathlib import Path

import numpy as np
import pytest

from models import image
from models.codec import bitstream
from service.cli import main
from tests.support.api_keys import TOKENS
from tests.support.service import Service, free_port

pytestmark = [pytest.mark.redis, pytest.mark.weights]

FILES = 5


@pytest.fixture
def photos(tmp_path: Path, photo: image.Pixels) -> Path:
    """A folder with pictures, one of which is in a folder below."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for n in range(FILES):
        cut = photo[100 + n : 164 + n, 200:300].copy()
        name = "more/last" if n == FILES - 1 else str(n)
        (tmp_path / f"photos/{name}.png").write_bytes(image.write(cut, "png"))
    (tmp_path / "photos/notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def written(folder: Path) -> dict[str, int]:
    """Path below the folder -> time of the last change, of all files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def test_folders_are_converted_as_fast_as_the_service_allows_and_once(
    guarded: Service, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The key of the decodes may have one job at a time; the command has five files at a time."""
    url = str(guarded.client.base_url)
    coded, drawn = tmp_path / "coded", tmp_path / "drawn"
    monkeypatch.setenv("AFTERIMAGE_API_KEY", TOKENS["both"])
    assert main.main(["encode", str(photos), "-o", str(coded), "--url", url]) == 0
    names = {f"{n}.msh" for n in range(FILES - 1)} | {"more/last.msh"}
    assert written(coded).keys() == names
    assert bitstream.parse((coded / "more/last.msh").read_bytes()).width == 100

    monkeypatch.setenv("AFTERIMAGE_API_KEY", TOKENS["single"])
    (coded / "0.msh").write_bytes(b"damaged")
    asked = ["decode", str(coded), "-o", str(drawn), "--url", url, "--tier", "ddim-10", "--steps",
             "2", "--jobs", str(FILES), "--skip-existing"]  # fmt: skip
    assert main.main(asked) == 1
    assert f"afterimage: {coded}/0.msh: " in capsys.readouterr().err
    first = written(drawn)
    assert first.keys() == {name.replace(".msh", ".png") for name in names - {"0.msh"}}
    picture = image.read((drawn / "1.png").read_bytes(), 10**6)
    assert not np.array_equal(picture, image.read((photos / "1.png").read_bytes(), 10**6))

    (coded / "0.msh").write_bytes((coded / "1.msh").read_bytes())
    assert main.main(asked) == 0
    assert "4 of 5 outputs exist and are skipped" in capsys.readouterr().err
    second = written(drawn)
    assert second.items() - first.items() == {("0.png", second["0.png"])}


def test_a_service_that_is_away_is_reported_at_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    assert main.main(["encode", str(photos), "-o", f"{tmp_path}/out", "--url", url]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert time.monotonic() - began < 5
    assert 1 <= len(lines) <= FILES and all(
        line.startswith(f"afterimage: {url}: ") for line in lines
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.msh", "--source", "store:in/a.msh", "-o", "b.png"], "choose either the input a.msh"),
        (["a.msh", "--target", "store:out/a", "-o", "b.png"], "choose either --output b.png"),
        (["a.msh", "b.msh", "--target", "store:out/a"], "`afterimage batch`"),
        (["--source", "store:in/a.msh"], "--output: name the file"),
        (["--source", "store:in/a.msh", "-o", "out/"], "--output: name the file"),
        (["a.msh"], "--output is missing; name a file or a folder"),
        (["-o", "out/"], "there is no input"),
        (["a.msh", "-o", "b.png", "--jobs", "0"], "--jobs is 0"),
        (["empty", "-o", "out/", "--url", "http://127.0.0.1:1"], "no files that end with .msh"),
    ],
)
def test_wrong_combinations_of_inputs_and_outputs_are_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.msh", "b.msh"):
        (tmp_path / name).touch()
    assert main.main(["decode", *arguments]) == 1
    assert said in capsys.readouterr().err
