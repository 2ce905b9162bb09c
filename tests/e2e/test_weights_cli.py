"""`afterimage weights`, and a service that uses imported weights."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from models import checkpoint, image
from models.codec import bitstream, codec
from tests.e2e.test_cli import afterimage, read
from tests.support import zoo
from tests.support.compressai import Reference, mean_scale_hyperprior
from tests.support.data import DATA
from tests.support.service import fork_service
from tests.support.waiting import wait_for
from tests.unit.test_zoo import compressed, random_codec

pytestmark = [pytest.mark.weights, pytest.mark.usefixtures("loaded_once")]


@pytest.fixture(scope="module")
def net(compressai: ModuleType) -> Reference:
    """A random network with the sizes of quality 5."""
    return random_codec(192, 320, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, net: Reference) -> Path:
    """A weights folder with that network imported for metric ms-ssim."""
    root = tmp_path_factory.mktemp("import")
    torch.save({"state_dict": net.state_dict()}, root / "mine.pth.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(root / "weights"))
        done = afterimage("weights", "import", root / "mine.pth.tar", "-q", 5, "-m", "ms-ssim")
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = checkpoint.manifest(root / "weights")
    assert done.stdout == f"{entry.weights_id} is installed as quality 5, metric ms-ssim\n"
    return root / "weights"


@pytest.fixture
def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set AFTERIMAGE_WEIGHTS_DIR to the folder; the id of the imported weights."""
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(folder))
    return checkpoint.manifest(folder)[0].weights_id


def test_list_shows_imported_and_shipped_weights(imported: str) -> None:
    done = afterimage("weights", "list")
    assert done.returncode == 0
    head, first, *shipped = (line.split() for line in done.stdout.splitlines())
    assert head == ["id", "kind", "model", "quality", "metric", "file", "source"]
    file = f"mbt2018-mean_q5_ms-ssim_{imported}.safetensors"
    assert first == [imported, "codec", "mbt2018-mean", "5", "ms-ssim", file, "mine.pth.tar"]
    assert {row[-1] for row in shipped} == {"shipped"}
    assert sorted(row[3] for row in shipped) == ["-", "-", "1", "2", "3"]


def test_encode_and_decode_use_imported_weights(
    tmp_path: Path, imported: str, small: image.Pixels
) -> None:
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    options: tuple[object, ...] = ("-q", 5, "--metric", "ms-ssim")
    done = afterimage("encode", tmp_path / "a.png", "-o", tmp_path / "a.msh", *options)
    assert done.returncode == 0
    b = bitstream.parse((tmp_path / "a.msh").read_bytes())
    assert (b.quality, b.metric, b.weights_id) == (5, "ms-ssim", imported)
    options = ("--tier", "perceptual", "--steps", 1)
    done = afterimage("decode", tmp_path / "a.msh", "-o", tmp_path / "b.webp", *options)
    assert done.returncode == 0
    assert read(tmp_path / "b.webp").shape == small.shape
    assert b"synthesised detail" in (tmp_path / "b.webp").read_bytes()
    assert afterimage("decode", tmp_path / "a.msh", "-o", tmp_path / "b.npy").returncode == 0
    assert np.load(tmp_path / "b.npy").shape == small.shape


def test_compressai_loads_exported_weights(tmp_path: Path, imported: str, net: Reference) -> None:
    options = ("-q", 5, "-m", "ms-ssim", "-o", tmp_path / "out.pth")
    assert afterimage("weights", "export", *options).returncode == 0
    state = torch.load(tmp_path / "out.pth")
    mean_scale_hyperprior(192, 320).load_state_dict(state)
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value), name


def test_the_service_serves_imported_weights(
    tmp_path: Path, imported: str, net: Reference, small: image.Pixels, small_msh: bytes
) -> None:
    b, theirs = compressed(net, small, 5)
    data = bytearray(bitstream.serialize(b))
    data[1] |= 1 << 4  # CompressAI's code for ms-ssim
    expected = codec.to_pixels(codec.crop(theirs.clamp(0, 1), b.height, b.width)).astype(int)
    with fork_service(tmp_path) as service:
        client = service.client
        params: dict[str, str | int] = {"tier": "perceptual", "steps": 1}
        draft = client.post("/v1/decodes", params=params, content=bytes(data))
        assert np.abs(image.read(draft.content, 10**6) - expected).max() <= 1
        state = wait_for(client, draft.headers["location"])
        assert (state["status"], state["codec_weights"]) == ("succeeded", imported)

        params = {"quality": "5", "metric": "ms-ssim"}
        picture = image.write(small, "png")
        encoded = client.post("/v1/encodes", params=params, content=picture)
        assert bitstream.parse(encoded.content).weights_id == imported
        header = client.post("/v1/inspect", content=encoded.content).json()
        assert (header["weights_id"], header["decodable"]) == (imported, True)
        assert client.post("/v1/decodes", content=small_msh).status_code == 200
        missing = client.post("/v1/encodes", params={"quality": "6"}, content=picture)
        assert missing.status_code == 422
        assert "quality 6, metric mse" in missing.json()["detail"]


def test_a_failed_download_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    done = afterimage("weights", "import", "zoo", "--quality", 4, "--metric", "ms-ssim")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("afterimage: mbt2018-mean-ms-ssim-4-")
    assert "cannot be downloaded from CompressAI's zoo" in line
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("import", "missing.pth", "-q", "5"), "No such file"),
        (("import", DATA / "kodim23.png", "-q", "5"), "kodim23.png: not a safetensors file"),
        (("export", "-q", "6", "-o", "a.pth"), "quality 6, metric mse"),
        (("export", "-q", "2", "--id", "00" * 8, "-o", "a.pth"), "0000000000000000"),
        (("export", "-q", "2", "-o", "a.bin"), ".pth"),
        (("remove", "00" * 8), "0000000000000000"),
    ],
)
def test_wrong_arguments_are_an_error_of_one_line(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = afterimage("weights", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert message in line


def test_remove_deletes_the_file_and_the_manifest_entry(
    tmp_path: Path, imported: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(tmp_path))
    assert afterimage("weights", "remove", imported).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.toml"]
    assert checkpoint.manifest(tmp_path) == []


@pytest.mark.compressai
def test_another_model_is_imported_used_exported_and_removed(
    tmp_path: Path, small: image.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is told from the tensors; `encode` and `export` are told it."""
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(tmp_path / "weights"))
    theirs = zoo.reference("bmshj2018-factorized", 128, 192)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    done = afterimage("weights", "import", tmp_path / "a.pth", "-q", 1)
    (entry,) = checkpoint.manifest(tmp_path / "weights")
    installed = f"{entry.weights_id} is installed as bmshj2018-factorized, quality 1, metric mse\n"
    assert (done.stdout, done.stderr) == (installed, "")
    row = afterimage("weights", "list").stdout.splitlines()[1].split()
    assert row[:4] == [entry.weights_id, "codec", "bmshj2018-factorized", "1"]
    (tmp_path / "a.png").write_bytes(image.write(small, "png"))
    options = ("--model", "bmshj2018-factorized", "--format", "compressai", "-q", 1)
    done = afterimage("encode", tmp_path / "a.png", "-o", tmp_path / "a.bin", *options)
    assert done.returncode == 0
    line = json.loads(afterimage("inspect", tmp_path / "a.bin").stdout)
    assert (line["model"], line["decodable"]) == ("bmshj2018-factorized", True)
    assert afterimage("decode", tmp_path / "a.bin", "-o", tmp_path / "b.png").returncode == 0
    b = bitstream.parse((tmp_path / "a.bin").read_bytes())
    with torch.inference_mode():
        x_hat = theirs.decompress([[b.y_string]], [8, 12])["x_hat"]
    difference = codec.crop_to_pixels(x_hat, b.height, b.width).astype(int) - read(
        tmp_path / "b.png"
    )
    assert abs(difference).max() <= 1
    to = ("-q", 1, "-o", tmp_path / "out.pth")
    done = afterimage("weights", "export", "--model", "bmshj2018-factorized", *to)
    assert done.returncode == 0
    theirs.load_state_dict(torch.load(tmp_path / "out.pth"))
    assert afterimage("weights", "remove", entry.weights_id).returncode == 0
    done = afterimage("decode", tmp_path / "a.bin", "-o", tmp_path / "b.png")
    assert "no weights of bmshj2018-factorized for quality 1" in done.stderr
