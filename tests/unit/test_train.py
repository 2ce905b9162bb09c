"""The trainer's parts, and a run of seconds."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from models import checkpoint, decoder, image, zoo
from models.train import bank, export
from models.train.diffusion import TrainConfig, Trainer
from models.train.lpips import Lpips


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As training is meant to run beside other work; two threads would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory, photo: image.Pixels) -> tuple[Path, Path]:
    """Four cuts of a photograph, one of them held out, encoded at quality 2."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("a", "b", "c", "bsds_val_d")):
        cut = photo[:170, 180 * i : 180 * (i + 1)]
        Image.fromarray(cut).save(folder / f"{name}.png")
    out = folder / "train", folder / "held"
    for held_out, to in zip((False, True), out, strict=True):
        bank.build(bank.photographs(folder, held_out), to / "q2", 2)
    return out


def test_held_out_photographs_are_never_trained_on(tmp_path: Path) -> None:
    for name in ("bsds_val_1.jpg", "bsds_test_1.jpg", "in_1.PNG", "notes.txt"):
        (tmp_path / name).touch()
    names = [[p.name for p in bank.photographs(tmp_path, held)] for held in (False, True)]
    assert names == [["bsds_test_1.jpg", "in_1.PNG"], ["bsds_val_1.jpg"]]


def test_crops_of_all_tensors_belong_together(banks: tuple[Path, Path]) -> None:
    loaded = bank.Bank(banks[0])
    for i, (_, t) in enumerate(loaded.items):
        assert t["x"].shape == (3, 160, 176)
        rows, columns = t["bits"].shape
        # mark every position of the latents in the pixels, and look for the same mark in the crop
        mark = torch.arange(rows * columns).reshape(rows, columns)
        t["x"] = mark.repeat_interleave(16, 0).repeat_interleave(16, 1)[None].expand(3, -1, -1)
        t["bits"] = mark
        x, _, _, bits = loaded._cut(i, 64, torch.Generator().manual_seed(i))
        assert torch.equal(x[0, ::16, ::16], bits[0])


def test_a_bank_is_built_once(banks: tuple[Path, Path]) -> None:
    file = next((banks[1] / "q2").iterdir())
    before = file.stat().st_mtime_ns
    bank.build([file.with_suffix(".png")], banks[1] / "q2", 2)
    assert file.stat().st_mtime_ns == before


def test_the_codecs_picture_in_the_bank_is_near_the_original(banks: tuple[Path, Path]) -> None:
    batch = bank.Bank(banks[0]).batch(4, 128, torch.Generator().manual_seed(0))
    assert batch.x.shape == batch.x_hat.shape == (4, 3, 128, 128)
    assert batch.y_hat.shape == (4, 192, 8, 8)
    assert batch.bits.shape == (4, 1, 8, 8)
    assert float((batch.x - batch.x_hat).square().mean()) < 10**-2.6
    assert batch.quality.tolist() == [2] * 4


def test_lpips_equals_the_package(lpips_file: Path, photo: image.Pixels) -> None:
    from models.evaluate.metrics import LpipsAlex

    a = torch.from_numpy(photo[:128, :128].copy()).permute(2, 0, 1)[None].float() / 255
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    ours = float(Lpips(lpips_file)(a, b))
    assert ours == pytest.approx(LpipsAlex(lpips_file)(a, b), rel=1e-4)
    assert ours > 0


@pytest.fixture
def config(
    tmp_path: Path, banks: tuple[Path, Path], lpips_file: Path
) -> Callable[..., TrainConfig]:
    def make(**changed: object) -> TrainConfig:
        plan = (("phase1", 0.05), ("phase2", 0.05))
        values: dict[str, object] = {
            "bank": str(banks[0]), "held_out": str(banks[1]), "out": str(tmp_path / "run"),
            "plan": plan, "lpips": str(lpips_file), "batch": 2, "crop": 64,
        }  # fmt: skip
        return TrainConfig(**{**values, **changed})  # type: ignore[arg-type]

    return make


def test_a_run_learns_both_phases_and_leaves_loadable_weights(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    trainer = Trainer(config())
    before = {k: v.clone() for k, v in trainer.average.items()}
    trainer.run()
    assert trainer.stage == 2
    assert any(not torch.equal(v, before[k]) for k, v in trainer.average.items())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in log if "held_v" in row] == ["phase1", "phase2"]
    assert all(np.isfinite(row["held_lpips"]) for row in log if "held_v" in row)
    with safe_open(tmp_path / "run/decoder.safetensors", "pt") as f:
        assert json.loads(f.metadata()["config"])["latents"] == 192
        card = json.loads(f.metadata()["train"])
        assert card["steps"] > 0
        assert "bank" not in card
        assert "/" not in card["lpips"]


def test_exported_weights_load_by_the_manifest(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    trainer = Trainer(config())
    trainer.save()
    folder = tmp_path / "weights"
    identity = export.decoder(tmp_path / "run/decoder.safetensors", folder)
    loaded = decoder.load(folder)
    assert loaded.weights_id == identity
    assert loaded.net.config == trainer.net.config
    shipped = next(e for e in checkpoint.manifest() if e.quality == 1)
    again = export.codec(checkpoint.WEIGHTS / shipped.file, 1, folder)
    assert again == shipped.weights_id
    assert zoo.load(1, folder=folder).weights_id == again
    assert [e.name for e in checkpoint.manifest(folder)] == ["decoder_compact", "msh_q1"]


def test_a_loss_that_is_not_finite_falls_back_to_the_average(
    config: Callable[..., TrainConfig],
) -> None:
    trainer = Trainer(config(plan=(("phase1", 0.02),)))
    with torch.no_grad():
        trainer.net.denoiser.outward.bias.fill_(float("nan"))
    trainer.run()
    assert trainer.step > 0
    assert all(bool(torch.isfinite(p).all()) for p in trainer.net.parameters())


def test_a_killed_run_goes_on_where_it_was_saved(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    own = config()
    command = [
        *(sys.executable, "-m", "models.train", "diffusion", "--bank", own.bank),
        *("--held-out", own.held_out, "--out", own.out),
        *("--plan", "phase1:5", "--batch", "2", "--crop", "64"),
    ]
    state, log = tmp_path / "run/state.pt", tmp_path / "run/log.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(state.exists)
            time.sleep(4)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    first = Trainer(config(plan=(("phase1", 5.0),)))
    assert first.step > 0
    before = log.read_text().count('"resumed"')
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: log.exists() and log.read_text().count('"resumed"') > before)
        finally:
            process.kill()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    resumed = [row for row in rows if "resumed" in row]
    assert resumed[-1]["step"] == first.step
    assert Trainer(config(plan=(("phase1", 5.0),))).step >= first.step


def until(true: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
