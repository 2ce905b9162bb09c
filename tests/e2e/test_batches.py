"""Batches with real workers: kills of API and worker, realism, command line and Python client."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models import image
from service.cli import main
from service.client import Client
from tests.support.batches import counts, folder_stores, state, submitted
from tests.support.forked import Forked, command
from tests.support.rig import Rig, rig
from tests.support.service import free_port
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]


class Api:
    """An API process without workers, which tests kill and start again."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.log = rig.folder / f"{name}.log"
        self.log.touch()
        self.port, self.environment = free_port(), rig.environment
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.start()

    def start(self) -> None:
        arguments = ("serve", "--port", str(self.port), "--workers", "0")
        self.process = Forked(functools.partial(command, arguments), self.environment, self.log)

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/readyz").status_code == 200
            return False

        until(ready, "the API starts")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.client.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_msh: bytes) -> Path:
    root = tmp_path_factory.mktemp("stores")
    folder_stores(root)
    for n in range(40):
        (root / f"in/{n:02d}.msh").write_bytes(tiny_msh)
    return root


@pytest.fixture(scope="module")
def own(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    stores = {"AFTERIMAGE_STORES": str(root / "stores.toml")}
    with rig(tmp_path_factory.mktemp("rig") / "own", forked=True, **stores) as made:
        yield made


@pytest.fixture(scope="module")
def api(own: Rig) -> Iterator[Api]:
    made = Api(own, "api")
    yield made
    made.close()


def test_a_batch_survives_kills_of_api_and_worker(own: Rig, api: Api, root: Path) -> None:
    """Nothing is lost or drawn twice, and the counts are right in the end."""
    other = Api(own, "other")
    own.worker().ready()
    items = [
        {"source": f"store:in/{n:02d}.msh", "target": f"store:out/kills/{n}.png", "seed": n}
        for n in range(40)
    ]
    items[7]["source"] = "store:in/none.msh"
    location = submitted(api.client, items=items, tier="ddim-10", steps=2)

    def succeeded(client: httpx.Client) -> int:
        return int(state(client, location)["counts"]["succeeded"])

    until(lambda: succeeded(api.client) >= 4, "the first are drawn")
    api.kill()
    until(lambda: succeeded(other.client) >= 12, "the other API goes on")
    own.alive()[0].kill()
    other.close()  # at the same time as the worker: nobody is left
    own.worker().ready()
    api.start()
    until(lambda: state(api.client, location)["status"] == "ended", "the end", 90)
    document = state(api.client, location)
    assert counts(document) == {"succeeded": 39, "failed": 1}
    assert [item["number"] for item in document["failed"]] == [7]
    assert len(list(root.glob("out/kills/*.png"))) == 39
    keys = own.store.queue.keys("afterimage:job:*")
    commits = [own.commits(key.decode().rpartition(":")[2]) for key in keys]  # type: ignore[union-attr]
    assert sorted(commits) == [1] * 39


def test_realism_mixes_the_pictures_of_a_batch(own: Rig, api: Api, root: Path) -> None:
    own.one()
    drawn: dict[float, image.Pixels] = {}
    for realism in (0.0, 0.5, 1.0):
        target = f"store:out/{realism}.webp"
        items = [{"source": "store:in/00.msh", "target": target}]
        location = submitted(api.client, items=items, tier="ddim-10", steps=2, realism=realism)
        until(lambda at=location: state(api.client, at)["status"] == "ended", "the end")  # type: ignore[misc]
        assert counts(state(api.client, location)) == {"succeeded": 1}
        drawn[realism] = image.read((root / f"out/{realism}.webp").read_bytes(), 10**6)
    instant = api.client.post("/v1/decodes", params={"source": "store:in/00.msh"}).content
    assert np.array_equal(drawn[0.0], image.read(instant, 10**6))
    assert np.abs(drawn[0.5].astype(int) - drawn[0.0]).mean() > 0
    mean = (drawn[0.0].astype(int) + drawn[1.0]) / 2
    assert np.abs(drawn[0.5] - mean).max() <= 1


def test_the_command_line_and_the_client_follow_a_batch(
    own: Rig, api: Api, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.one()
    url = f"http://127.0.0.1:{api.port}"
    file = tmp_path / "items.jsonl"
    rows: list[dict[str, Any]] = [
        {"source": f"store:in/{n:02d}.msh", "target": f"store:out/cli/{n}.png", "seed": 50 + n}
        for n in range(3)
    ]
    rows[1]["source"] = "store:in/gone.msh"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--url", url, "--tier", "ddim-10", "--steps", "1"]
    assert main.main(["batch", "submit", "--items", str(file), *asked, "--watch"]) == 1
    lines = capsys.readouterr().out.splitlines()
    id = lines[0].split()[0]
    assert lines[0].startswith(f"{id} running: 3 waiting")
    assert lines[-1].startswith(f"{id} ended: 2 succeeded, 1 failed")
    assert main.main(["batch", "status", id, "--failed", "--url", url]) == 0
    failed = json.loads(capsys.readouterr().out)
    assert (failed["number"], failed["source"]) == (1, "store:in/gone.msh")
    (root / "in/gone.msh").write_bytes((root / "in/00.msh").read_bytes())
    assert main.main(["batch", "retry", id, "--url", url, "--watch"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{id} ended: 3 succeeded")
    assert main.main(["batch", "list", "--limit", "1", "--url", url]) == 0
    assert f"  {id} ended: 3 succeeded" in capsys.readouterr().out
    assert main.main(["batch", "cancel", id, "--url", url]) == 1
    assert "has already ended" in capsys.readouterr().err
    prefixes = ["store:in/", "store:out/pre/", "--format", "jpeg", "--suffix", "0.msh"]
    assert main.main(["batch", "submit", *prefixes, *asked]) == 0
    id = capsys.readouterr().out.split()[0]
    with Client(url) as client:
        *_, last = client.batches.follow(id, 0.1)
        assert counts(last) == {"succeeded": 4}
        assert list(client.batches.failed(id)) == []
        assert [batch["id"] for batch in client.batches.list()][0] == id
    assert sorted(f.name for f in (root / "out/pre").iterdir()) == [f"{n}.jpg" for n in range(4)]
    assert main.main(["batch", "status", "0" * 32, "--url", url]) == 1
    assert "there is no batch" in capsys.readouterr().err


def test_the_command_line_reads_and_writes_objects(
    own: Rig, api: Api, root: Path, tmp_path: Path, small: image.Pixels,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own.one()
    url = ["--url", f"http://127.0.0.1:{api.port}"]
    (root / "in/photo.png").write_bytes(image.write(small, "png"))
    photo = ["encode", "--source", "store:in/photo.png"]
    assert main.main([*photo, "--target", "store:out/photo.msh", *url]) == 0
    assert "store:out/photo.msh: written" in capsys.readouterr().err
    assert main.main([*photo, "-o", str(tmp_path / "a.msh"), *url]) == 0
    coded = (tmp_path / "a.msh").read_bytes()
    assert coded == (root / "out/photo.msh").read_bytes()
    pictures: list[image.Pixels] = []
    for tier in (["--tier", "instant"], ["--tier", "ddim-10", "--steps", "2", "--seed", "9"]):
        for source in (["--source", "store:out/photo.msh"], [str(tmp_path / "a.msh")]):
            for target in (["--target", "store:out/b.webp"], ["-o", str(tmp_path / "b.webp")]):
                assert main.main(["decode", *source, *target, *tier, *url]) == 0
            (tmp_path / "b.webp").rename(tmp_path / "kept.webp")
            for file in (root / "out/b.webp", tmp_path / "kept.webp"):
                pictures.append(image.read(file.read_bytes(), 10**6))
    first, drawn = pictures[0], pictures[4]
    assert not np.array_equal(first, drawn)
    assert all(np.array_equal(first, other) for other in pictures[:4])
    assert all(np.array_equal(drawn, other) for other in pictures[4:])
    assert main.main(["decode", "--source", "store:in/none", "-o", "a.png", *url]) == 1
    assert "there is no object store:in/none" in capsys.readouterr().err
