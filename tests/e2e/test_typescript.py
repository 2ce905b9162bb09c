"""A TypeScript client that is generated from the OpenAPI document."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import image
from service.client import Client
from tests.support.service import Service

pytestmark = [pytest.mark.redis, pytest.mark.weights]

PROJECT = Path(__file__).parents[1] / "typescript"
SEED = 2**53 + 1
"""What the program sends; as a number in JavaScript, it would be 2**53."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the TypeScript project with its packages."""
    if not (PROJECT / "node_modules").exists():
        pytest.fail("the packages are not installed: `make typescript`", pytrace=False)
    for name in ("package.json", "tsconfig.json", "decode.ts"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(PROJECT / "node_modules")
    return tmp_path


def node(project: Path, script: str, *arguments: str) -> str:
    """Run a script with the Node.js of the machine, else the environment's; returns its output."""
    folders = [os.environ["PATH"], str(Path(sys.executable).parent)]
    program = shutil.which("node", path=os.pathsep.join(folders))
    assert program is not None, "there is no Node.js: `make typescript`"
    done = subprocess.run(
        [program, script, *arguments], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_generated_client_encodes_decodes_and_keeps_large_seeds(
    service: Service, project: Path, small: image.Pixels
) -> None:
    url = str(service.client.base_url)
    (project / "photo.png").write_bytes(image.write(small, "png"))
    generator = "node_modules/openapi-typescript/bin/cli.js"
    node(project, generator, f"{url}/openapi.json", "--output", "afterimage.d.ts")
    node(project, "node_modules/typescript/bin/tsc")
    lines = node(project, "decode.js", url, "photo.png", "out.webp").splitlines()
    assert all(re.fullmatch(rf"\w+ \d of 1 seed {SEED}", line) for line in lines), lines
    assert lines[-1] == f"succeeded 1 of 1 seed {SEED}"
    drawn = image.read((project / "out.webp").read_bytes(), 10**6)
    with Client(url) as client:
        coded = client.encode((project / "photo.png").read_bytes())
        *_, last = client.decode(coded, seed=SEED, format="webp")
    assert last.picture is not None
    assert np.array_equal(drawn, image.read(last.picture, 10**6))
