"""The diffusion decoder's trainer: its losses, its presets, and runs of up to half a minute."""

import argparse
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
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
from models.train import __main__ as cli
from models.train import bank, export, network
from models.train.adapt import fit, follow, turned
from models.train.config import Stage, add_options
from models.train.decoder_config import DiffusionConfig, resolved
from models.train.diffusion import DiffusionTask
from models.train.distributed import Ranks
from models.train.photos import photographs
from models.train.run import Run
from tests.support.waiting import until

CPU = Ranks(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKED = (
    "compressai", "torchvision", "numba", "google_crc32c", "tqdm", "tensorboard", "lpips",
    "fastapi", "redis",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: image.Pixels) -> Path:
    """20 photographs, cut from the left of one, some mirrored or reduced; 4 held out, from its
    right."""
    folder = tmp_path_factory.mktemp("photos")
    whole = Image.fromarray(photo)
    for i in range(24):
        held_out = i >= 20
        left = 576 if held_out else 64 * (i % 6)
        top = (100 if held_out else 75) * (i % 4)
        side = 192 if held_out or i % 3 else 240
        cut = whole.crop((left, top, left + side, top + side)).resize((192, 192))
        turned = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else cut
        turned.save(folder / f"{'bsds_val_' if held_out else ''}{i}.png")
    return folder


@pytest.fixture(scope="module")
def banks(folder: Path) -> tuple[Path, Path]:
    """The photographs encoded at quality 2: to train on, and held out."""
    out = folder / "train", folder / "held"
    for held_out, to in zip((False, True), out, strict=True):
        bank.build(photographs(folder, held_out), to / "q2", 2)
    return out


@pytest.fixture
def config(
    tmp_path: Path, banks: tuple[Path, Path], lpips_file: Path
) -> Callable[..., DiffusionConfig]:
    def make(**changed: Any) -> DiffusionConfig:
        values: dict[str, Any] = {
            "bank": str(banks[0]), "held_out": str(banks[1]), "out": str(tmp_path / "run"),
            "plan": (Stage("phase1", 0.03), Stage("phase2", 0.04)), "lpips": str(lpips_file),
            "batch": 4, "crop": 64, "widths": (16, 24, 32),
        }  # fmt: skip
        return resolved(DiffusionConfig(**(values | changed)))

    return make


def trained(config: DiffusionConfig) -> Run:
    run = Run(DiffusionTask(config, CPU), config, CPU)
    assert run.go()
    return run


def log(config: DiffusionConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_half_a_minute_on_20_photographs_beats_predicting_zero(
    config: Callable[..., DiffusionConfig],
) -> None:
    own = config(plan=(Stage("phase1", 0.5),), widths=(32, 48, 64), lr=1.5e-3, batch=8, lpips="")
    trained(own)
    (held,) = (row for row in log(own) if "held_v" in row)
    assert held["held_v"] < held["held_v_zero"]
    assert max(p.stat().st_size for p in Path(own.out).glob("checkpoint/*")) <= 16 << 20


def test_a_decoder_of_one_call_is_judged_at_its_only_call(
    config: Callable[..., DiffusionConfig],
) -> None:
    own = config(plan=(Stage("phase2", 0.03),), calls=1, spectrum=0.1, log_s=0.0)
    trained(own)
    rows = [row for row in log(own) if "ratio" in row]
    assert rows and all(row["lpips"] > 0 and row["spectrum"] > 0 for row in rows)


def test_a_run_learns_both_phases_and_leaves_loadable_weights(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    own = config(
        adversarial=0.15, adversarial_after=1, spectrum=0.05, times="middle", warm=5, seed=1
    )
    task = DiffusionTask(own, CPU)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    judge = [p.detach().clone() for p in task.modules["discriminator"].parameters()]
    assert Run(task, own, CPU).go()
    after = task.net.state_dict()
    assert any(not torch.equal(after[k], v) for k, v in before.items())
    pairs = zip(judge, task.modules["discriminator"].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    held = [row for row in log(own) if "held_v" in row]
    assert [row["stage"] for row in held] == ["phase1", "phase2"]
    assert all(math.isfinite(value) for row in held for k, value in row.items() if k != "stage")
    assert all(row["held_lpips"] > 0 and row["held_spectrum"] > 0 for row in held)
    with safe_open(tmp_path / "run/decoder.safetensors", "pt") as f:
        assert json.loads(f.metadata()["config"])["latents"] == 192
        card = json.loads(f.metadata()["train"])
    assert card["steps"] == held[-1]["step"]
    assert card["widths"] == [16, 24, 32]
    assert not any("/" in card[name] for name in ("bank", "held_out", "lpips"))


def test_exported_weights_load_by_the_manifest(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    own = config()
    run = Run(DiffusionTask(own, CPU), own, CPU)
    run.save()
    folder = tmp_path / "weights"
    identity = export.decoder(tmp_path / "run/decoder.safetensors", folder)
    loaded = decoder.load(folder)
    assert loaded.weights_id == identity
    assert loaded.net.config == DiffusionTask(own, CPU).net.config
    shipped = next(e for e in checkpoint.manifest() if e.quality == 1)
    again = export.codec(checkpoint.WEIGHTS / shipped.file, 1, folder)
    assert again == shipped.weights_id
    assert zoo.load(1, folder=folder).weights_id == again
    assert [e.name for e in checkpoint.manifest(folder)] == ["decoder_compact", "msh_q1"]
    assert not any(e.card for e in checkpoint.manifest(folder))
    (folder / "compact.md").write_text(f"Of {identity}.")
    (folder / "msh.md").write_text("Of others.")
    export.decoder(tmp_path / "run/decoder.safetensors", folder)
    assert [e.card for e in checkpoint.manifest(folder)] == ["", "compact.md"]
    own = library.Library({(1, "mse"): zoo.load(1, folder=folder)}, decoder.load(folder))
    b = own.codecs[1, "mse"].encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
    assert own.draft(b, 0).shown
    state = zoo.reference(128, 192).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other")
    export.codec(tmp_path / "other", 1, folder)  # the decoder has not followed
    own = library.Library({(1, "mse"): zoo.load(1, folder=folder)}, decoder.load(folder))
    b = own.codecs[1, "mse"].encode(torch.full((1, 3, 64, 64), 0.5), "msh", "exact")
    assert not own.draft(b, 0).shown


def test_an_exported_decoder_replaces_the_one_before(tmp_path: Path) -> None:
    small: dict[str, Any] = {"widths": (32,) * 5, "condition": (32,) * 4, "latents": 16}
    for base, changed in ((COMPACT, {}), (PAPER, small | {"down": (1,) * 5, "up": (2,) * 5})):
        net = UNet(replace(base, embedding=32, **changed))
        tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
        save_file(tensors, tmp_path / "new", {"config": json.dumps(asdict(net.config))})
        export.decoder(tmp_path / "new", tmp_path / "weights")
    assert [e.name for e in checkpoint.manifest(tmp_path / "weights")] == ["decoder_paper"]
    assert decoder.load(tmp_path / "weights").config == net.config
    assert [p.stem for p in (tmp_path / "weights").glob("*.safetensors")] == ["decoder_paper"]


def test_a_killed_run_goes_on_where_it_was_saved_also_elsewhere(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    own = config(plan=(Stage("phase1", 5.0),))
    command = [
        *(sys.executable, "-P", "-m", "models.train", "diffusion", "--bank", own.bank),
        *("--held-out", own.held_out, "--out", own.out, "--lpips", own.lpips),
        *("--plan", "phase1:5", "--batch", "4", "--crop", "64", "--widths", "16,24,32"),
        *("--save-s", "0.5", "--log-s", "0.5"),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            file = tmp_path / "run/log.jsonl"
            until(lambda: file.exists() and len(log(own)) > 3, "rows in the log", 90)
        finally:
            process.send_signal(signal.SIGKILL)
    elsewhere = config(plan=own.plan, out=str(tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "run/checkpoint", tmp_path / "elsewhere/checkpoint")
    killed = Run(DiffusionTask(elsewhere, CPU), elsewhere, CPU).progress
    assert killed.steps > 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: any("resumed" in row for row in log(own)), "the run goes on", 90)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    (resumed,) = (row for row in log(own) if "resumed" in row)
    assert resumed["step"] == killed.steps
    stopped = Run(DiffusionTask(own, CPU), own, CPU).progress
    assert killed.steps < stopped.steps
    assert killed.spent < stopped.spent < 60


def test_a_network_of_nan_falls_back_to_the_average(
    config: Callable[..., DiffusionConfig],
) -> None:
    own = config(plan=(Stage("phase1", 0.01),))
    task = DiffusionTask(own, CPU)
    run = Run(task, own, CPU)
    with torch.no_grad():
        task.net.denoiser.outward.bias.fill_(float("nan"))
    assert run.go()
    assert run.progress.steps > 0
    assert all(bool(torch.isfinite(p).all()) for p in task.net.parameters())


def test_the_papers_preset_trains_every_parameter(config: Callable[..., DiffusionConfig]) -> None:
    plan = (Stage("phase1", 1.0),)
    own = config(preset="paper", widths=(32, 32, 32, 32, 32), plan=plan, batch=1, warm=1, lr=1e-3)
    task = DiffusionTask(own, CPU)
    run = Run(task, own, CPU)
    for _ in range(5):  # zero starts hide what is behind them for a step or two
        run._step(own.plan[0], 0.1)
    named = dict(task.net.named_parameters())
    assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [n for n, p in named.items() if p.grad is not None and not p.grad.any()]
    means = {k: float(total) / n for k, (total, n) in run._sums.items()}
    assert means.keys() == {"simple", "vlb", "lpips", "loss"}
    assert 0.5 < means["simple"] < 1.5
    assert all(math.isfinite(value) for value in means.values())


def test_weights_start_another_network_where_they_fit(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    own = config()
    Run(DiffusionTask(own, CPU), own, CPU).save()
    file = Path(own.out) / "decoder.safetensors"
    wider = config(init=str(file), widths=(16, 24, 48), out=str(tmp_path / "wider"), seed=9)
    started, stored = DiffusionTask(wider, CPU).net.state_dict(), load_file(file)
    same = {k for k, v in stored.items() if torch.equal(started[k].half(), v)}
    assert {"scales", "denoiser.inward.weight"} <= same
    assert started["conditioner.latents.2.weight"].shape[0] == 48


def test_weights_of_which_nothing_fits_are_refused(
    config: Callable[..., DiffusionConfig], lpips_file: Path
) -> None:
    with pytest.raises(WeightsError, match="nothing in it fits this network"):
        DiffusionTask(config(init=str(lpips_file)), CPU)


def test_crops_larger_than_the_held_out_photographs_are_refused(
    config: Callable[..., DiffusionConfig],
) -> None:
    with pytest.raises(ValueError, match="as large as a crop of 208 pixels"):
        DiffusionTask(config(crop=208), CPU)


def test_another_codecs_weights_start_all_but_what_reads_latents(
    config: Callable[..., DiffusionConfig], tmp_path: Path
) -> None:
    own = config()
    net = DiffusionTask(own, CPU).net
    file = tmp_path / "other.safetensors"
    save_file({k: torch.full(v.shape, 0.5) for k, v in net.state_dict().items()}, file)
    started = DiffusionTask(config(init=str(file), other_codec=True), CPU).net.state_dict()
    anew = {k for k, v in started.items() if not bool((v == 0.5).all())}
    read = {f"latents.{q}.{part}" for q in range(9) for part in ("weight", "bias")}
    assert anew == {f"conditioner.{k}" for k in read | {"latent_scale"}} | {"scales"}
    assert 0 < float(started["scales"][2]) < 0.2


def test_latents_that_turned_are_read_as_before() -> None:
    torch.manual_seed(0)
    idle = torch.zeros(400, 2)  # channels that a wider codec does not use
    old = torch.cat([10 * torch.randn(400, 12), idle], 1)
    turn, offset = torch.linalg.qr(torch.randn(12, 12))[0], torch.randn(12)
    new = torch.cat([1.2 * old[:, :12] @ turn + offset, idle], 1)
    layer, scale = PerQuality(3, 14 + 2, 16), torch.rand(14) + 0.5
    tensors = {f"conditioner.latents.{k}": v for k, v in layer.state_dict().items()}
    tensors["conditioner.latent_scale"] = scale

    def read(y_hat: Tensor, shown: float) -> Tensor:
        rest = torch.tensor([0.3, shown]).expand(len(y_hat), 2)
        given = torch.cat([y_hat * scale * shown, rest], 1)
        with torch.no_grad():
            out: Tensor = layer(given.T[None, :, :, None], torch.tensor([2]))
        return out

    before, hidden = read(old, 1), read(old, 0)
    assert (read(new, 1) - before).abs().max() > 1
    change, left = fit((old[i::2].double(), new[i::2].double()) for i in range(2))
    assert left < 1e-6
    for name, value in turned(tensors, 2, change).items():
        assert name == "conditioner.latents.2.weight"
        layer.load_state_dict({"2.weight": value}, strict=False)
    torch.testing.assert_close(read(new, 1), before, atol=1e-2, rtol=0)
    torch.testing.assert_close(read(new, 0), hidden)


@pytest.mark.weights
def test_a_decoder_follows_its_codec(
    config: Callable[..., DiffusionConfig], photo: image.Pixels, tmp_path: Path
) -> None:
    own = config()
    Run(DiffusionTask(own, CPU), own, CPU).save()
    decoder, out = Path(own.out) / "decoder.safetensors", tmp_path / "followed.safetensors"
    before, after = (checkpoint.WEIGHTS / f"msh_q{q}.safetensors" for q in (2, 3))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(image.write(photo[:256, :384].copy(), "png"))
    save_file(load_file(decoder), decoder, checkpoint.read(decoder)[1] | {checkpoint.CODECS: "[]"})
    assert follow(decoder, 2, before, before, photos, out) < 5e-4
    assert 2e-3 < follow(decoder, 2, before, after, photos, out) < 0.1
    assert checkpoint.CODECS not in checkpoint.read(out)[1]  # it knows another now
    was, became = load_file(decoder), load_file(out)
    assert {k for k in was if not torch.equal(was[k], became[k])} == {
        "conditioner.latents.2.weight"
    }
    with pytest.raises(WeightsError, match="reads no latents of quality 2"):
        follow(before, 2, before, after, photos, out)


def test_bfloat16_leaves_the_latents_path_exact(config: Callable[..., DiffusionConfig]) -> None:
    task = DiffusionTask(config(bf16=True), CPU)
    batch = task.bank.batch(2, 64, torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    conditioner = task.net.conditioner
    conditioner.latents.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    conditioner.picture.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    out = task.network.given(batch, 0.0)(torch.randn_like(batch.x), torch.rand(2))
    assert seen == [torch.bfloat16, torch.float32]
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "paper", "plan": (Stage("phase2", 1),)}, "'phase2': paper has phase1"),
        ({"held_out": ""}, "either --photos, or --bank and --held-out"),
        ({"crop": 70}, "multiple of 16"),
        ({"crop": 32}, "below 48"),
        ({"batch": 1}, "a batch of 2 or more"),
        ({"calls": 0}, "--calls 0: choose a number from 1 to 1000"),
    ],
)
def test_options_that_contradict_each_other_are_named(
    config: Callable[..., DiffusionConfig], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_a_preset_has_a_plan_of_its_own() -> None:
    def plan(**options: str) -> list[str]:
        return [s.name for s in resolved(DiffusionConfig(photos="in", out="out", **options)).plan]

    assert plan() == ["phase1", "phase2"]
    assert plan(preset="paper") == ["phase1"]


DECODER, CODEC = (checkpoint.WEIGHTS / f"{n}.safetensors" for n in ("decoder_compact", "msh_q2"))


@pytest.mark.weights
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"export {CODEC}", "msh_q2.safetensors: no diffusion decoder"),
        (f"export {DECODER} --quality 2", "decoder_compact.safetensors: no codec's weights"),
        (f"export {DECODER} --sizes 8 8", "--quality says which"),
        ("bank --photos {0} --out {0} --quality 2", "cut.jpg: image file is truncated"),
        ("diffusion --photos {0} --out {0}", "no photographs named bsds_val_"),
        (f"diffusion --photos {{1}} --out {{0}} --lpips {__file__}", "test_train.py: "),
        ("diffusion --photos {1} --out {0} --init {0}/none", "none: No such file"),
    ],
    ids=["codec", "decoder", "sizes", "truncated", "held-out", "lpips", "init"],
)
def test_wrong_files_are_told_in_a_line_before_anything_is_encoded(
    command: str, message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture = io.BytesIO()
    Image.open(folder / "0.png").convert("RGB").save(picture, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(picture.getvalue()[:-200])
    monkeypatch.setattr("sys.argv", ["train", *command.format(tmp_path, folder).split()])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1]
    assert "encoded" not in told


def test_widths_of_other_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="compact has 3 levels"):
        network.build("compact", (8, 8), 192)


def test_every_option_has_help_and_reads_what_it_says() -> None:
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)
    own = argparse.ArgumentParser()
    add_options(own, DiffusionConfig)
    given = ["--out", "o", "--plan", "phase1:1.5", "--widths", "8,16,24", "--no-bf16"]
    read = DiffusionConfig(**vars(own.parse_args(given)))
    assert read.plan == (Stage("phase1", 1.5),)
    assert read.widths == (8, 16, 24)
    assert read.bf16 is False
    assert read.batch == 8
    with pytest.raises(argparse.ArgumentTypeError, match="not NAME:MINUTES"):
        Stage.plan("phase1:soon")


ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # an import of these now fails
from models.train.__main__ import main
photos, out = sys.argv[1:]
def run(*args):
    sys.argv = ["train", *args]
    main()
run("msh", "--photos", photos, "--out", out + "/msh", "--N", "8", "--M", "12", "--crop", "64",
    "--batch", "2", "--plan", "2:0.01", "--whole", "1")
run("bank", "--photos", photos, "--out", out + "/bank", "--quality", "2", "--limit", "1",
    "--codecs", out + "/msh")
run("diffusion", "--photos", photos, "--out", out + "/diffusion", "--codecs", out + "/msh",
    "--qualities", "2", "--variants", "1", "--crop", "64", "--batch", "2", "--widths", "8,8,8",
    "--plan", "phase1:0.01,phase2:0.01")
"""


def test_training_needs_torch_numpy_pillow_and_safetensors_alone(
    folder: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(folder), str(tmp_path)],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stage phase2: " in done.stderr  # progress as plain lines
    assert "tensorboard is not installed" in (tmp_path / "msh/log.jsonl").read_text()
    made = ("msh/msh_q2", "bank/q2/0", "diffusion/decoder")
    assert all((tmp_path / f"{name}.safetensors").exists() for name in made)
