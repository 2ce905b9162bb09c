"""The wheel of the Python client alone, in an environment with nothing but its dependencies."""

import json
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from models import image
from service import __version__
from tests.support.service import Service

pytestmark = [pytest.mark.redis, pytest.mark.weights]

PROJECT = Path(__file__).parents[2] / "deploy/client"
PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
from service import __version__
from service.client import Client

url, photo, output = sys.argv[1:]
with Client(url) as client:
    coded = client.encode(Path(photo).read_bytes())
    updates = list(client.decode(coded, seed=11))
Path(output).write_bytes(updates[-1].picture)
absent = ("torch", "numpy", "PIL", "pydantic", "fastapi", "redis", "worker")
print(json.dumps({
    "kinds": [update.kind for update in updates],
    "found": [name for name in absent if importlib.util.find_spec(name)],
    "version": __version__,
}))
"""
MAX_WHEEL_BYTES = 30_000


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=PROJECT)
    (made,) = folder.glob("*.whl")
    return made


def required(texts: list[str]) -> set[str]:
    """The names of the packages that these requirements need here, with their own ones."""
    found: set[str] = set()
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= {requirement.name} | required(metadata.requires(requirement.name) or [])
    return found


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with a wheel, and links to the packages that it requires."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin/python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", wheel, cwd=folder,
    )  # fmt: skip
    (about,) = packages.glob("*.dist-info/METADATA")
    declared = re.findall(r"^Requires-Dist: (.+)$", about.read_text(), re.M)
    for name in required(declared):
        for file in metadata.files(name) or ():
            top = packages / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(Path(str(metadata.distribution(name).locate_file(file.parts[0]))))
    return python


def test_the_wheel_has_the_client_and_little_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    assert {"service/client.py", "service/py.typed", "models/errors.py"} <= set(names)
    assert [name for name in names if name.endswith("LICENSE")]
    assert not [name for name in names if name.startswith(("worker", "tests", "service/routes"))]


def test_the_wheel_decodes_without_torch_fastapi_and_redis(
    service: Service, wheel: Path, small: image.Pixels, tmp_path: Path
) -> None:
    python = environment(tmp_path / "venv", wheel)
    (tmp_path / "photo.png").write_bytes(image.write(small, "png"))
    arguments = (str(service.client.base_url), "photo.png", "out.png")
    said = json.loads(run(python, "-I", "-c", PROGRAM, *arguments, cwd=tmp_path))
    assert (said["found"], said["version"]) == ([], __version__)
    assert (said["kinds"][0], said["kinds"][-1]) == ("draft", "final")
    assert image.read((tmp_path / "out.png").read_bytes(), 10**6).shape == small.shape
