"""Training of the diffusion decoder: presets, options, initial weights, short runs and exports."""

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import checkpoint, image, library
from models.codec import zoo
from models.diffusion import decoder
from models.diffusion.conditioner import PerQuality
from models.diffusion.presets import COMPACT, PAPER
from models.diffusion.unet import UNet
from models.errors import WeightsError
from models.tiers import Settings
from models.train import __main__ as cli
from models.train import bank, export, network
from models.train.adapt import adapt, fit_map, folded
from models.train.config import RunConfig, Stage, add_options, card
from models.train.decoder_config import DiffusionConfig, resolve
from models.train.diffusion import DiffusionTask
from models.train.distributed import ProcessGroup
from models.train.encoder import Encoder
from models.train.losses import Denoise
from models.train.msh import MshConfig
from models.train.perceptual import TEXTURE
from models.train.photos import photographs
from models.train.run import Run
from models.train.teacher import Teacher
from tests.support.forked import Forked, trainer
from tests.support.waiting import until
from tests.support.zoo import random

CPU = ProcessGroup(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONAL_PACKAGES = (
    "compressai", "torchvision", "numba", "google_crc32c", "tqdm", "tensorboard", "lpips",
    "fastapi", "redis",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: image.Pixels) -> Path:
    """20 crops of one photograph's left side, some mirrored or reduced, and 4 held-out ones of its
    right side."""
    folder = tmp_path_factory.mktemp("photos")
    whole = Image.fromarray(photo)
    for i in range(24):
        held_out = i >= 20
        left = 576 if held_out else 64 * (i % 6)
        top = (100 if held_out else 75) * (i % 4)
        side = 192 if held_out or i % 3 else 240
        cut = whole.crop((left, top, left + side, top + side)).resize((192, 192))
        flipped = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else cut
        flipped.save(folder / f"{'bsds_val_' if held_out else ''}{i}.png")
    return folder


@pytest.fixture(scope="module")
def banks(folder: Path) -> tuple[Path, Path]:
    """Banks of the training and held-out photographs at quality 2."""
    out = folder / "train", folder / "held"
    for held_out, to in zip((False, True), out, strict=True):
        bank.build(photographs(folder, held_out), to / "q2", 2, Encoder.load(2, None, CPU.device))
    return out


@pytest.fixture
def config(
    tmp_path: Path, banks: tuple[Path, Path], lpips_file: Path
) -> Callable[..., DiffusionConfig]:
    def make(**changed: Any) -> DiffusionConfig:
        values: dict[str, Any] = {
            "bank": str(banks[0]), "held_out": str(banks[1]), "out": str(tmp_path / "run"),
            "plan": (Stage("phase1", steps=4), Stage("phase2", steps=8)), "lpips": str(lpips_file),
            "batch": 4, "crop": 64, "widths": (16, 24, 32),
        }  # fmt: skip
        return resolve(DiffusionConfig(**(values | changed)))

    return make


@pytest.fixture
def few_held_out_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on 8 crops instead of 64, for tests that do not compare the held-out losses."""
    monkeypatch.setattr("models.train.diffusion.VALIDATION_CROPS", 8)


def trained(config: DiffusionConfig) -> Run:
    run = Run(DiffusionTask(config, CPU), config, CPU)
    assert run.train()
    return run


def resumed_step(config: DiffusionConfig) -> int | None:
    """The step from which a run was resumed, read from its log; None if it was not."""
    return next((row["step"] for row in log(config) if "resumed" in row), None)


def log(config: DiffusionConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_40_steps_on_20_photographs_beat_predicting_zero(
    config: Callable[..., DiffusionConfig],
) -> None:
    settings = config(
        plan=(Stage("phase1", steps=40),), widths=(16, 24, 32), lr=1.5e-3, warm=10, batch=8,
        lpips="",
    )  # fmt: skip
    trained(settings)
    (held,) = (row for row in log(settings) if "held_v" in row)
    assert held["step"] == 40
    assert held["held_v"] < held["held_v_zero"]
    assert max(p.stat().st_size for p in Path(settings.out).glob("checkpoint/*")) <= 16 << 20


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_decoder_with_one_call_gets_perceptual_losses_at_that_call(
    config: Callable[..., DiffusionConfig],
) -> None:
    weights = dict.fromkeys(TEXTURE, 0.1)
    settings = config(plan=(Stage("phase2", steps=3),), calls=1, log_s=0.0, **weights)
    trained(settings)
    rows = [row for row in log(settings) if "ratio" in row]
    terms = ("lpips", *TEXTURE)
    assert len(rows) == 3 and all(row[term] > 0 for row in rows for term in terms)


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_perceptual_decoder_is_trained_alone_from_a_wider_one(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    wide = config(plan=(Stage("phase1", steps=1),), out=str(tmp_path / "wide"))
    trained(wide)
    settings = config(
        plan=(Stage("perceptual", steps=2),), preset="small", widths=(8, 16, 24), calls=1,
        narrow=str(tmp_path / "wide" / "decoder.safetensors"), log_s=0.0,
    )  # fmt: skip
    trained(settings)
    rows = [row for row in log(settings) if "ratio" in row]
    assert len(rows) == 2 and all(row["lpips"] > 0 and "v" not in row for row in rows)
    drawn = decoder.from_file(Path(settings.out) / "decoder.safetensors")
    assert (drawn.config.widths, drawn.config.depth) == ((8, 16, 24), 1)


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_decoder_learns_its_teachers_pictures_from_the_same_noise(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    teacher = config(plan=(Stage("perceptual", steps=1),), calls=1, out=str(tmp_path / "teacher"))
    trained(teacher)
    weights = str(tmp_path / "teacher" / "decoder.safetensors")
    settings = config(
        plan=(Stage("perceptual", steps=2),), calls=1, init=weights, teacher=weights, lr_phase2=1.0,
        warm=1, log_s=0.0,
    )  # fmt: skip
    trained(settings)
    same, other = (row["teacher"] for row in log(settings) if "teacher" in row)
    assert same < 1e-9 < other  # after one step the weights differ from the teacher's


def test_crops_of_qualities_that_the_teacher_does_not_know_do_not_count(
    config: Callable[..., DiffusionConfig],
) -> None:
    task = DiffusionTask(config(), CPU)  # knows quality 2
    generator = torch.Generator().manual_seed(0)
    batch = task.bank.batch(2, 64, generator)
    picture, noise = (torch.randn(batch.x.shape, generator=generator) for _ in range(2))
    teacher = Teacher(task.net, 192, CPU.device, bf16=False)

    def distance(qualities: list[int], crops: int) -> Tensor:
        chosen = replace(batch, quality=torch.tensor(qualities)).rows(slice(crops))
        keep = torch.ones(crops)
        return teacher.distance(picture[:crops], chosen, noise[:crops], keep)

    torch.testing.assert_close(distance([2, 5], 2), distance([2, 2], 1))
    assert float(distance([5, 5], 2)) == 0
    with pytest.raises(WeightsError, match="192 latent channels; choose a compact one for 320"):
        Teacher(task.net, 320, CPU.device, bf16=False)


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_decoder_learns_the_pictures_of_other_codecs_and_their_qualities(
    config: Callable[..., DiffusionConfig], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    save_file(random("bmshj2018-factorized"), tmp_path / "other.safetensors")
    command = f"train bank --photos {folder} --out {tmp_path} --limit 2 --variants 1"
    for quality in (2, 5):
        options = f"--other {tmp_path / 'other.safetensors'} --quality {quality}"
        monkeypatch.setattr("sys.argv", f"{command} {options}".split())
        cli.main()
    settings = config(
        plan=(Stage("perceptual", steps=2),), calls=1, others=str(tmp_path), others_share=1.0
    )
    task = DiffusionTask(settings, CPU)
    start = {name: tensor.clone() for name, tensor in task.net.state_dict().items()}
    assert [q for q, scale in enumerate(start["scales"].tolist()) if scale != 1] == [2, 5]
    for name in ("conditioner.latents.{}.weight", "conditioner.latents.{}.bias"):
        assert torch.equal(start[name.format(5)], start[name.format(2)])
    for name in ("conditioner.quality.weight", "denoiser.quality.weight"):
        assert torch.equal(start[name][5], start[name][2])
    hidden, seen = [], set()
    denoiser_for = task.network.denoiser_for

    def spy(batch: bank.Batch, beta: float, keep: Tensor | None = None) -> Denoise:
        seen.update(batch.quality.tolist())
        hidden.append(keep is not None and not keep.any() and not batch.y_hat.any())
        return denoiser_for(batch, beta, keep)

    monkeypatch.setattr(task.network, "denoiser_for", spy)
    assert Run(task, settings, CPU).train()
    assert hidden == [True, True, False, False]  # two steps; the validation measures two losses
    assert seen == {2, 5}


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_run_trains_both_phases_and_exports_weights_with_a_card(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    settings = config(
        adversarial=0.15, adversarial_after=1, spectrum=0.05, times="middle", warm=5, seed=1
    )
    task = DiffusionTask(settings, CPU)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    discriminator = [p.detach().clone() for p in task.modules["discriminator"].parameters()]
    assert Run(task, settings, CPU).train()
    after = task.net.state_dict()
    assert any(not torch.equal(after[k], v) for k, v in before.items())
    pairs = zip(discriminator, task.modules["discriminator"].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    held = [row for row in log(settings) if "held_v" in row]
    assert [row["stage"] for row in held] == ["phase1", "phase2"]
    assert all(math.isfinite(value) for row in held for k, value in row.items() if k != "stage")
    assert all(row["held_lpips"] > 0 and row["held_spectrum"] > 0 for row in held)
    with safe_open(tmp_path / "run/decoder.safetensors", "pt") as f:
        assert json.loads(f.metadata()["config"])["latents"] == 192
        card = json.loads(f.metadata()["train"])
    assert card["steps"] == held[-1]["step"] == 12
    assert card["widths"] == [16, 24, 32]
    assert not any("/" in card[name] for name in ("bank", "held_out", "lpips"))


def test_exported_weights_load_by_the_manifest(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    settings = config()
    run = Run(DiffusionTask(settings, CPU), settings, CPU)
    run.save()
    folder = tmp_path / "weights"
    identity = export.decoder(tmp_path / "run/decoder.safetensors", folder)
    loaded = decoder.load(folder)
    assert loaded.weights_id == identity
    assert loaded.net.config == DiffusionTask(settings, CPU).net.config
    shipped = next(e for e in checkpoint.manifest() if e.quality == 1)
    again = export.codec(checkpoint.WEIGHTS / shipped.file, 1, folder)
    assert again == shipped.weights_id
    assert zoo.load(1, folder=folder).weights_id == again
    assert [e.name for e in checkpoint.manifest(folder)] == ["decoder_compact", "msh_q1"]
    assert not any(e.card for e in checkpoint.manifest(folder))
    (folder / "compact.md").write_text(f"Weights {identity}.")
    (folder / "msh.md").write_text("Other weights.")
    export.decoder(tmp_path / "run/decoder.safetensors", folder)
    assert [e.card for e in checkpoint.manifest(folder)] == ["", "compact.md"]
    installed = library.Library({(1, "mse"): zoo.load(1, folder=folder)}, decoder.load_all(folder))
    b = installed.codecs[1, "mse"].encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
    assert installed.diffusion_input(b, Settings("ddim", 1), 0).latents_visible
    state = zoo.with_tables(random("mbt2018-mean", 128, 192))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other")
    export.codec(tmp_path / "other", 1, folder)  # a codec that the decoder does not know
    installed = library.Library({(1, "mse"): zoo.load(1, folder=folder)}, decoder.load_all(folder))
    b = installed.codecs[1, "mse"].encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
    assert not installed.diffusion_input(b, Settings("ddim", 1), 0).latents_visible


def test_an_exported_decoder_replaces_the_installed_one(tmp_path: Path) -> None:
    small: dict[str, Any] = {"widths": (32,) * 5, "condition": (32,) * 4, "latents": 16}
    for base, changed in ((COMPACT, {}), (PAPER, small | {"down": (1,) * 5, "up": (2,) * 5})):
        net = UNet(replace(base, embedding=32, **changed))
        tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
        save_file(tensors, tmp_path / "new", {"config": json.dumps(asdict(net.config))})
        export.decoder(tmp_path / "new", tmp_path / "weights")
    assert [e.name for e in checkpoint.manifest(tmp_path / "weights")] == ["decoder_paper"]
    assert decoder.load(tmp_path / "weights").config == net.config
    assert [p.stem for p in (tmp_path / "weights").glob("*.safetensors")] == ["decoder_paper"]


def test_a_killed_run_resumes_from_its_checkpoint_in_any_folder(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    settings = config(plan=(Stage("phase1", steps=100_000),))
    command = (
        *("diffusion", "--bank", settings.bank),
        *("--held-out", settings.held_out, "--out", settings.out, "--lpips", settings.lpips),
        *("--plan", "phase1:100000steps", "--batch", "4", "--crop", "64", "--widths", "16,24,32"),
        *("--save-s", "0", "--log-s", "0"),
    )
    process = Forked(partial(trainer, command), os.environ, tmp_path / "first.log")
    try:
        file = tmp_path / "run/log.jsonl"
        until(lambda: file.exists() and len(log(settings)) > 3, "rows in the log", 90)
    finally:
        process.kill()
        process.wait()
    elsewhere = config(plan=settings.plan, out=str(tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "run/checkpoint", tmp_path / "elsewhere/checkpoint")
    killed = Run(DiffusionTask(elsewhere, CPU), elsewhere, CPU).progress
    assert killed.steps > 0
    process = Forked(partial(trainer, command), os.environ, tmp_path / "second.log")
    try:
        until(
            lambda: "loss" in log(settings)[-1] and resumed_step(settings),
            "steps after resuming",
            90,
        )
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert resumed_step(settings) == killed.steps
    stopped = Run(DiffusionTask(settings, CPU), settings, CPU).progress
    assert killed.steps < stopped.steps
    assert killed.spent < stopped.spent < 60


@pytest.mark.usefixtures("few_held_out_crops")
def test_a_network_with_nan_is_restored_from_the_average(
    config: Callable[..., DiffusionConfig],
) -> None:
    settings = config(plan=(Stage("phase1", steps=3),))
    task = DiffusionTask(settings, CPU)
    run = Run(task, settings, CPU)
    with torch.no_grad():
        task.net.get_parameter("denoiser.outward.bias").fill_(float("nan"))
    assert run.train()
    assert run.progress.steps > 0
    assert all(bool(torch.isfinite(p).all()) for p in task.net.parameters())


def test_the_papers_preset_trains_every_parameter(config: Callable[..., DiffusionConfig]) -> None:
    plan = (Stage("phase1", steps=50),)
    settings = config(
        preset="paper", widths=(32, 32, 32, 32, 32), plan=plan, batch=1, warm=1, lr=1e-3
    )
    task = DiffusionTask(settings, CPU)
    run = Run(task, settings, CPU)
    for _ in range(5):  # layers behind one that starts at zero have no gradient in the first steps
        run._step(settings.plan[0], 0.1)
    named = dict(task.net.named_parameters())
    assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [n for n, p in named.items() if p.grad is not None and not p.grad.any()]
    means = {k: float(total) / n for k, (total, n) in run._sums.items()}
    assert means.keys() == {"simple", "vlb", "lpips", "loss"}
    assert 0.5 < means["simple"] < 1.5
    assert all(math.isfinite(value) for value in means.values())


def test_matching_weights_initialise_another_network(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    settings = config()
    Run(DiffusionTask(settings, CPU), settings, CPU).save()
    file = Path(settings.out) / "decoder.safetensors"
    wider = config(init=str(file), widths=(16, 24, 48), out=str(tmp_path / "wider"), seed=9)
    started, stored = DiffusionTask(wider, CPU).net.state_dict(), load_file(file)
    same = {k for k, v in stored.items() if torch.equal(started[k].half(), v)}
    assert {"scales", "denoiser.inward.weight"} <= same
    assert started["conditioner.latents.2.weight"].shape[0] == 48


def test_init_weights_without_a_matching_tensor_are_refused(
    config: Callable[..., DiffusionConfig], lpips_file: Path
) -> None:
    with pytest.raises(WeightsError, match="nothing in it fits this network"):
        DiffusionTask(config(init=str(lpips_file)), CPU)


def test_crops_larger_than_the_held_out_photographs_are_refused(
    config: Callable[..., DiffusionConfig],
) -> None:
    with pytest.raises(ValueError, match="as large as a crop of 208 pixels"):
        DiffusionTask(config(crop=208), CPU)


def test_weights_for_another_codec_leave_the_layers_that_read_latents_at_random(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    settings = config()
    net = DiffusionTask(settings, CPU).net
    file = tmp_path / "other.safetensors"
    save_file({k: torch.full(v.shape, 0.5) for k, v in net.state_dict().items()}, file)
    started = DiffusionTask(config(init=str(file), other_codec=True), CPU).net.state_dict()
    random = {k for k, v in started.items() if not bool((v == 0.5).all())}
    reading = {f"latents.{q}.{part}" for q in range(9) for part in ("weight", "bias")}
    assert random == {f"conditioner.{k}" for k in reading | {"latent_scale"}} | {"scales"}
    assert 0 < float(started["scales"][2]) < 0.2


def test_a_quality_that_the_first_weights_do_not_know_gets_a_scale_of_its_residual(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    measured = DiffusionTask(config(), CPU).net.scales[2]
    state = UNet(network.configuration("compact", (16, 24, 32))).state_dict()
    state["scales"][3] = 0.02  # trained at quality 3 only; the bank is of quality 2
    state["denoiser.quality.weight"].normal_()
    save_file(state, tmp_path / "of_3.safetensors")
    net = DiffusionTask(config(init=str(tmp_path / "of_3.safetensors")), CPU).net
    assert net.trained_qualities() == [2, 3]
    assert torch.equal(net.scales[2], measured)
    embedding = net.state_dict()["denoiser.quality.weight"]
    assert torch.equal(embedding[2], embedding[3])


def test_a_folded_map_undoes_a_rotation_of_the_latents() -> None:
    torch.manual_seed(0)
    idle = torch.zeros(400, 2)  # channels that a wider codec does not use
    old = torch.cat([10 * torch.randn(400, 12), idle], 1)
    rotation, offset = torch.linalg.qr(torch.randn(12, 12))[0], torch.randn(12)
    new = torch.cat([1.2 * old[:, :12] @ rotation + offset, idle], 1)
    layer, scale = PerQuality(3, 14 + 2, 16), torch.rand(14) + 0.5
    tensors = {f"conditioner.latents.{k}": v for k, v in layer.state_dict().items()}
    tensors["conditioner.latent_scale"] = scale

    def read(y_hat: Tensor, visible: float) -> Tensor:
        rest = torch.tensor([0.3, visible]).expand(len(y_hat), 2)
        inputs = torch.cat([y_hat * scale * visible, rest], 1)
        with torch.no_grad():
            out: Tensor = layer(inputs.T[None, :, :, None], torch.tensor([2]))
        return out

    before, hidden = read(old, 1), read(old, 0)
    assert (read(new, 1) - before).abs().max() > 1
    latent_map, unexplained = fit_map((old[i::2].double(), new[i::2].double()) for i in range(2))
    assert unexplained < 1e-6
    for name, value in folded(tensors, 2, latent_map).items():
        assert name == "conditioner.latents.2.weight"
        layer.load_state_dict({"2.weight": value}, strict=False)
    torch.testing.assert_close(read(new, 1), before, atol=1e-2, rtol=0)
    torch.testing.assert_close(read(new, 0), hidden)


@pytest.mark.weights
def test_a_decoder_is_adapted_to_another_codec(
    config: Callable[..., DiffusionConfig], photo: image.Pixels, tmp_path: Path
) -> None:
    settings = config()
    Run(DiffusionTask(settings, CPU), settings, CPU).save()
    decoder, out = Path(settings.out) / "decoder.safetensors", tmp_path / "adapted.safetensors"
    before, after = (checkpoint.WEIGHTS / f"msh_q{q}.safetensors" for q in (2, 3))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(image.write(photo[:256, :384].copy(), "png"))
    save_file(load_file(decoder), decoder, checkpoint.read(decoder)[1] | {checkpoint.CODECS: "[]"})
    assert adapt(decoder, 2, before, before, photos, out) < 5e-4
    assert 2e-3 < adapt(decoder, 2, before, after, photos, out) < 0.1
    assert checkpoint.CODECS not in checkpoint.read(out)[1]  # the list of codecs is outdated
    old, new = load_file(decoder), load_file(out)
    assert {k for k in old if not torch.equal(old[k], new[k])} == {"conditioner.latents.2.weight"}
    with pytest.raises(WeightsError, match="reads no latents of quality 2"):
        adapt(before, 2, before, after, photos, out)


def test_with_bfloat16_the_branch_of_the_latents_stays_in_float32(
    config: Callable[..., DiffusionConfig],
) -> None:
    task = DiffusionTask(config(bf16=True), CPU)
    batch = task.bank.batch(2, 64, torch.Generator().manual_seed(0))
    dtypes: list[torch.dtype] = []
    conditioner = task.net.conditioner
    conditioner.get_submodule("latents").register_forward_hook(
        lambda m, i, o: dtypes.append(o.dtype)
    )
    conditioner.get_submodule("picture").register_forward_hook(
        lambda m, i, o: dtypes.append(o.dtype)
    )
    out = task.network.denoiser_for(batch, 0.0)(torch.randn_like(batch.x), torch.rand(2))
    assert dtypes == [torch.bfloat16, torch.float32]
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"others": "x", "bank": "", "held_out": "", "photos": "x"}, "--others needs --bank"),
        ({"others": "x", "others_share": 1.5}, "--others-share 1.5: choose"),
        ({"preset": "paper", "plan": (Stage("phase2", 1),)}, "'phase2': paper has phase1"),
        ({"held_out": ""}, "either --photos, or --bank and --held-out"),
        ({"qualities": (2,)}, "--qualities: needs --photos"),
        ({"bank": "", "held_out": "", "photos": "x", "qualities": (0, 9)}, "--qualities 0: choose"),
        ({"adversarial": 0.1, "plan": (Stage("phase1", 1),)}, "--adversarial: needs the stage"),
        ({"teacher": "t", "preset": "paper", "plan": (Stage("phase1", 1),)}, "--teacher: needs"),
        ({"other_codec": True}, "--other-codec: needs --init"),
        ({"drop_latents": 12}, "--drop-latents 12: choose a number from 0 to 1"),
        ({"batch": 0, "plan": (Stage("phase1", 1),)}, "--batch 0: choose 1 or more"),
        ({"crop": 70}, "multiple of 16"),
        ({"crop": 32}, "not below 48"),
        ({"batch": 1}, "a batch of 2 or more"),
        ({"teacher": "t", "calls": 4}, "--calls 4: with --teacher, choose 1"),
        ({"calls": 0}, "--calls 0: choose a number from 1 to 1000"),
    ],
)
def test_wrong_options_are_named_in_the_error(
    config: Callable[..., DiffusionConfig], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_each_preset_has_a_default_plan() -> None:
    def plan(**options: Any) -> list[str]:
        return [s.name for s in resolve(DiffusionConfig(photos="in", out="out", **options)).plan]

    assert plan() == ["phase1", "phase2"]
    assert plan(preset="paper") == ["phase1"]


DECODER, CODEC = (checkpoint.WEIGHTS / f"{n}.safetensors" for n in ("decoder_compact", "msh_q2"))


@pytest.mark.weights
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"export {CODEC}", "msh_q2.safetensors: not a diffusion decoder"),
        (f"export {DECODER} --quality 2", "decoder_compact.safetensors: not a codec"),
        (f"export {DECODER} --sizes 8 8", "--sizes widens a codec: add its --quality"),
        (f"export {CODEC} --quality 2 --steps 1", "--steps is for a diffusion decoder"),
        ("diffusion --photos {1} --out {0} --widths 8,8", "2 numbers; compact has 3 levels"),
        ("bank --photos {0} --out {0} --quality 2", "cut.jpg: image file is truncated"),
        ("diffusion --photos {0} --out {0}", "no photographs named bsds_val_"),
        (f"diffusion --photos {{1}} --out {{0}} --lpips {__file__}", "test_train.py: "),
        ("diffusion --photos {1} --out {0} --init {0}/none", "none: No such file"),
    ],
    ids=["codec", "decoder", "sizes", "steps", "widths", "truncated", "held-out", "lpips", "init"],
)
def test_wrong_files_end_in_one_line_of_error_before_anything_is_encoded(
    command: str, message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture = io.BytesIO()
    Image.open(folder / "0.png").convert("RGB").save(picture, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(picture.getvalue()[:-200])
    monkeypatch.setattr("sys.argv", ["train", *command.format(tmp_path, folder).split()])
    with pytest.raises(SystemExit):
        cli.main()
    stderr = capsys.readouterr().err
    assert message in stderr.splitlines()[-1]
    assert "encoded" not in stderr


def test_a_wrong_number_of_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers; compact has 3 levels"):
        network.configuration("compact", (8, 8))


@pytest.mark.parametrize("config", [DiffusionConfig, MshConfig])
def test_a_card_names_no_local_folder(config: type[RunConfig]) -> None:
    paths: dict[str, Any] = {
        field.name: "/home/me/name"
        for field in fields(config)
        if isinstance(field.default, str) and "choices" not in field.metadata
    }
    assert paths
    assert "/" not in json.dumps(card(config(**paths)))


def test_every_option_has_help_and_is_parsed() -> None:
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)
    parser = argparse.ArgumentParser()
    add_options(parser, DiffusionConfig)
    plan = "phase1:1.5,phase2:200steps"
    arguments = ["--out", "o", "--plan", plan, "--widths", "8,16,24", "--no-bf16"]
    settings = DiffusionConfig(**vars(parser.parse_args(arguments)))
    assert settings.plan == (Stage("phase1", 1.5), Stage("phase2", steps=200))
    assert settings.widths == (8, 16, 24)
    assert settings.bf16 is False
    assert settings.batch == 8


@pytest.mark.parametrize("plan", ["phase1:soon", "phase1", "phase1:1.5steps", "phase1:200s", ""])
def test_a_plan_in_another_form_is_refused(plan: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write NAME:MINUTES or NAME:Nsteps"):
        Stage.parse_plan(plan)


WITHOUT_OPTIONAL_PACKAGES = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL_PACKAGES!r}))  # an import of these now fails
from models.train.__main__ import main
photos, out = sys.argv[1:]
def run(*args):
    sys.argv = ["train", *args]
    main()
run("msh", "--photos", photos, "--out", out + "/msh", "--N", "8", "--M", "12", "--crop", "64",
    "--batch", "2", "--plan", "2:2steps", "--whole", "1")
run("bank", "--photos", photos, "--out", out + "/bank", "--quality", "2", "--limit", "1",
    "--codecs", out + "/msh")
run("diffusion", "--photos", photos, "--out", out + "/diffusion", "--codecs", out + "/msh",
    "--qualities", "2", "--variants", "1", "--crop", "64", "--batch", "2", "--widths", "8,8,8",
    "--plan", "phase1:2steps,phase2:2steps")
"""


def test_training_needs_only_torch_numpy_pillow_and_safetensors(
    folder: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_OPTIONAL_PACKAGES, str(folder), str(tmp_path)],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stage phase2: 1 of 2 steps" in done.stderr  # progress as plain lines
    assert "tensorboard is not installed" in (tmp_path / "msh/log.jsonl").read_text()
    names = ("msh/msh_q2", "bank/q2/0", "diffusion/decoder")
    assert all((tmp_path / f"{name}.safetensors").exists() for name in names)
