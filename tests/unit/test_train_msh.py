"""Training of the codec, with a small network and crops of one photograph."""

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models import checkpoint, image
from models.codec import codec, zoo
from models.errors import WeightsError
from models.train import shards
from models.train.config import Stage
from models.train.distributed import ProcessGroup
from models.train.entropy import EntropyBottleneck, gaussian_likelihood
from models.train.hyperprior import TrainableHyperprior
from models.train.msh import LAMBDA, MshConfig, MshTask, with_init_sizes
from models.train.run import Run
from models.train.widen import widen
from tests.support.forked import Forked, trainer
from tests.support.waiting import until

CPU = ProcessGroup(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo: image.Pixels) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(photo[:300, 180 * i : 180 * (i + 1)]).save(folder / f"{i}.png")
    Image.fromarray(photo[64:320, 576:768]).save(folder / "bsds_val_d.png")
    return folder


@pytest.fixture
def config(tmp_path: Path, photos: Path) -> Callable[..., MshConfig]:
    def make(**changed: Any) -> MshConfig:
        values: dict[str, Any] = {
            "photos": str(photos), "out": str(tmp_path / "run"), "N": 12, "M": 16, "batch": 4,
            "crop": 64, "plan": (Stage("3", steps=40), Stage("2", steps=10)), "log_s": 0.0,
        }  # fmt: skip
        return with_init_sizes(MshConfig(**(values | changed)))

    return make


def log(config: MshConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_60_steps_lower_the_loss_and_the_coder_confirms_the_logged_bpp_and_psnr(
    config: Callable[..., MshConfig], photos: Path
) -> None:
    settings = config(plan=(Stage("3", steps=60), Stage("2", steps=15)), warm=10)
    assert Run(MshTask(settings, CPU), settings, CPU).train()
    losses = [row["loss"] for row in log(settings) if "loss" in row and row["stage"] == "3"]
    assert mean(losses[-10:]) < 0.9 * mean(losses[:10])
    held = {row["stage"]: row for row in log(settings) if "held_bpp" in row}
    assert held.keys() == {"3", "2"}
    for quality in (3, 2):
        file = Path(settings.out) / f"msh_q{quality}.safetensors"
        measured = coded(zoo.with_tables(load_file(file)), quality, photos / "bsds_val_d.png")
        logged = held[str(quality)]
        # after so few steps some symbols cost 30 bits by their density, 20 by the escape code
        assert measured == pytest.approx((logged["held_bpp"], logged["held_psnr"]), rel=0.2)
        assert measured[1] == pytest.approx(logged["held_psnr"], abs=0.05)
    with safe_open(Path(settings.out) / "msh_q2.safetensors", "pt") as f:
        card = json.loads(f.metadata()["train"])
    assert card["N"] == 12
    assert card["steps"] == held["2"]["step"]
    assert "/" not in card["photos"]


def test_validation_and_coder_agree_on_bpp_and_psnr_of_the_shipped_weights(
    config: Callable[..., MshConfig], photos: Path
) -> None:
    shipped = next(e for e in checkpoint.manifest() if e.quality == 2)
    settings = config(init=str(checkpoint.WEIGHTS / shipped.file), plan=(Stage("2", steps=1),))
    assert (settings.N, settings.M) == (128, 192)
    task = MshTask(settings, CPU)
    task.begin(0)
    metrics = task.validate(settings.plan[0])
    bpp, psnr = coded(checkpoint.load(shipped), 2, photos / "bsds_val_d.png")
    assert metrics["held_bpp"] == pytest.approx(bpp, rel=0.03)  # each string is flushed at its end
    assert metrics["held_psnr"] == pytest.approx(psnr, abs=0.01)


def coded(tensors: dict[str, Tensor], quality: int, file: Path) -> tuple[float, float]:
    """bpp and PSNR of a file, from the length of its coded strings."""
    installed = zoo.from_tensors(tensors, quality)
    x = codec.to_tensor(image.read(file.read_bytes(), 10**6))
    y_string, z_string, latents = installed.latent_coder.encode(x, "exact")
    mse = float((installed.synthesis(latents.y_hat) - x).square().mean())
    return 8 * (len(y_string) + len(z_string)) / x[0, 0].numel(), -10 * math.log10(mse)


def test_a_killed_run_resumes_in_another_folder(
    config: Callable[..., MshConfig], tmp_path: Path
) -> None:
    settings = config()
    command = (
        *("msh", "--photos", settings.photos),
        *("--out", settings.out, "--N", "12", "--M", "16", "--batch", "4", "--crop", "64"),
        *("--plan", "3:100000steps", "--save-s", "0", "--log-s", "0"),
    )
    process = Forked(partial(trainer, command), os.environ, tmp_path / "msh.log")
    try:
        until(lambda: _rows(settings) > 3, "rows in the log", 90)
    finally:
        process.kill()
        process.wait()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(Path(settings.out) / "checkpoint", elsewhere / "checkpoint")
    assert max(p.stat().st_size for p in elsewhere.rglob("*.*")) <= 16 << 20
    killed = shards.load(elsewhere / "checkpoint")[1]["progress"]
    assert killed["steps"] > 0
    assert killed["spent"] > 0
    moved = config(plan=(Stage("3", steps=killed["steps"] + 5),), out=str(elsewhere))
    run = Run(MshTask(moved, CPU), moved, CPU)
    assert (run.progress.steps, run.progress.spent) == (killed["steps"], killed["spent"])
    assert run.train()
    assert run.progress.steps == killed["steps"] + 5
    assert run.progress.total > killed["spent"]
    assert log(moved)[0]["step"] == killed["steps"]
    assert (elsewhere / "msh_q3.safetensors").exists()


def test_the_tail_of_a_stage_trains_only_the_hyperprior(config: Callable[..., MshConfig]) -> None:
    settings = config(plan=(Stage("3", steps=9),), tail=1.0)
    task = MshTask(settings, CPU)
    task.begin(0)
    run = Run(task, settings, CPU)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    run._step(settings.plan[0], 0.5)
    changed = {k for k, v in task.net.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("g_") for name in changed)
    assert {"h_a.0.weight", "h_s.4.weight", "entropy_bottleneck.matrices.0"} <= changed


def test_rescaled_latents_give_the_same_picture() -> None:
    torch.manual_seed(0)
    net = TrainableHyperprior(8, 12).eval()
    x = torch.rand(1, 3, 64, 64)
    y, z, x_hat = net.g_a(x), net.h_a(net.g_a(x)), net.g_s(net.g_a(x))
    prior = net.h_s(z)
    net.rescale(3.0)
    torch.testing.assert_close(net.g_a(x), 3 * y)
    torch.testing.assert_close(net.h_a(net.g_a(x)), z)
    torch.testing.assert_close(net.h_s(z), 3 * prior)
    torch.testing.assert_close(net.g_s(net.g_a(x)), x_hat)


@pytest.mark.compressai
def test_densities_equal_those_of_compressai() -> None:
    from compressai.entropy_models import EntropyBottleneck as Bottleneck
    from compressai.entropy_models import GaussianConditional

    torch.manual_seed(0)
    ours, theirs = EntropyBottleneck(4), Bottleneck(4)
    theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
    ours.update_quantiles()
    theirs.update(force=True, update_quantiles=True)
    torch.testing.assert_close(ours.quantiles, theirs.quantiles, rtol=1e-3, atol=2e-3)
    z = torch.randint(-3, 4, (2, 4, 5, 5)).float() + ours.medians
    with torch.no_grad():
        theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
        _, expected = theirs.eval()(z)
    actual = ours.likelihood(z).reshape(4, 2, 5, 5).transpose(0, 1)
    torch.testing.assert_close(actual, expected)
    y, scales, means = torch.randn(50) * 4, torch.rand(50) * 5, torch.randn(50)
    _, expected = GaussianConditional(None).eval()(y[None], scales[None], means[None])
    rounded = torch.round(y - means) + means
    torch.testing.assert_close(gaussian_likelihood(rounded, scales, means)[None], expected)


def test_projected_gdn_parameters_always_have_gradients() -> None:
    net = TrainableHyperprior(8, 12)
    gamma = net.get_parameter("g_a.1.gamma")
    with torch.no_grad():
        gamma.fill_(-1)
    net.project()
    net.g_a[1](torch.rand(1, 8, 4, 4)).sum().backward()
    assert gamma.grad is not None
    assert bool((gamma.grad != 0).all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"plan": (Stage("9", 1.0),)}, "one of 1, 2, 3, 4"), ({"crop": 100}, "multiple of 64")],
)
def test_wrong_options_are_named_in_the_error(
    config: Callable[..., MshConfig], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MshTask(config(**changed), CPU)


def test_weights_of_another_kind_are_refused(
    config: Callable[..., MshConfig], lpips_file: Path
) -> None:
    with pytest.raises(WeightsError, match="not a mean-scale hyperprior"):
        config(init=str(lpips_file))


def test_a_higher_quality_gives_the_squared_error_more_weight() -> None:
    assert LAMBDA[1] < LAMBDA[2] < LAMBDA[3]


def _rows(config: MshConfig) -> int:
    file = Path(config.out) / "log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("alive", [False, True])
def test_a_widened_codec_computes_the_same_and_only_live_channels_get_gradients(
    photo: image.Pixels, alive: bool
) -> None:
    torch.manual_seed(0)
    small, x = TrainableHyperprior(8, 12), codec.to_tensor(photo[:128, :192])
    small.rescale(40)  # otherwise all latents round to zero
    small.entropy_bottleneck.update_quantiles()
    with torch.no_grad():
        small.get_parameter("g_s.1.gamma").add_(0.01)  # let channels normalise each other
        wide = TrainableHyperprior(12, 20)
        wide.load_state_dict(widen(small.state_dict(), 12, 20, alive))
        y, (bits, x_hat) = small.g_a(x), small.eval()(x)
        wide_y, (wide_bits, wide_x_hat) = wide.g_a(x), wide.eval()(x)
    assert y.abs().max() > 1
    torch.testing.assert_close(wide_y[:, :12], y)
    assert not wide_y[:, 12:].any()
    torch.testing.assert_close(wide_x_hat, x_hat)
    assert float(wide_bits) == pytest.approx(float(bits), rel=0.02)  # 4 idle channels of z
    bits, x_hat = wide.train()(x)
    (bits / x.numel() + (x_hat - x).square().mean()).backward()
    input_axes = {"g_a.2": 1, "g_a.4": 1, "g_s.2": 0, "g_s.4": 0}
    for name, axis in input_axes.items():
        grad = wide.get_parameter(f"{name}.weight").grad
        assert grad is not None
        assert bool(grad.narrow(axis, 8, 4).any()) == alive


def test_a_codec_cannot_be_narrowed() -> None:
    with pytest.raises(WeightsError, match="8 and 12 channels cannot be widened to 8 and 10"):
        widen(TrainableHyperprior(8, 12).state_dict(), 8, 10)
