"""The wheel and the sdist install and run without the repository."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from models import checkpoint
from service import __version__
from tests.support.service import run_service

pytestmark = [pytest.mark.redis, pytest.mark.weights]

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run("hatchling", "build", "-t", "sdist", "-d", folder)
    (sdist,) = folder.glob("*.tar.gz")
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (unpacked,) = source.iterdir()
    run("hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    return folder


def test_the_version_is_the_same_everywhere() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == version("afterimage") == said
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(said)}\] - ", changes, re.M)


def test_the_wheel_has_the_weights_and_nothing_of_the_tests(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"models/weights/{e.file}" for e in checkpoint.manifest()} <= set(names)
    assert {f"{package}/py.typed" for package in ("models", "service", "worker")} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "models/train/weights/"))]
    (sdist,) = built.glob("*.tar.gz")
    inside = {n.partition("/")[2] for n in tarfile.open(sdist).getnames()}
    pages = {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "models/train/README.md",
    }
    assert {"LICENSE", "Dockerfile", "deploy/compose.yaml", *pages} <= inside


def test_the_wheel_serves_from_an_empty_folder(
    built: Path, tmp_path: Path, small_msh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = built.glob("*.whl")
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    run("pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", installed, wheel)
    cache.mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    asked = [sys.executable, "-P", "-c", "import service; print(service.__file__)"]
    where = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    assert where == str(installed / "service/__init__.py")
    with run_service(cache, "--workers", "0") as service:
        assert service.client.get("/openapi.json").json()["info"]["version"] == __version__
        for path in ("/", "/web/main.js", "/web/samples/parrots.webp"):
            assert service.client.get(path).is_success
        drawn = service.client.post("/v1/decodes", content=small_msh)
        assert drawn.is_success and drawn.content[:4] == b"\x89PNG"


def test_every_dependency_that_is_shipped_is_listed_with_its_licence() -> None:
    page = (ROOT / "deploy/LICENCES.md").read_text()
    packages, _, weights = page.partition("\nThe weights")
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (?!version)[^|]+ \| ([^|]+) \|$", packages, re.M))
    lock = (ROOT / "deploy/requirements-cpu.lock").read_text()
    locked = set(re.findall(r"^([\w.-]+)==", lock, re.M))
    assert len(locked) > 50 and locked == set(listed)
    assert all(licence.strip() for licence in listed.values())
    assert not [
        e.file for e in checkpoint.manifest() if f"| {e.file} | {e.weights_id} |" not in weights
    ]
