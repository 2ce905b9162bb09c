"""The codec's trainer, on a small network and cuts of one photograph."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
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
from models.train.config import Stage
from models.train.distributed import Ranks
from models.train.entropy import EntropyBottleneck, gaussian_likelihood
from models.train.hyperprior import Hyperprior
from models.train.msh import LAMBDA, MshConfig, MshTask, sized
from models.train.run import Run
from models.train.widen import widened
from tests.support.waiting import until

CPU = Ranks(0, 1, torch.device("cpu"))
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
            "crop": 64, "plan": (Stage("3", 0.07), Stage("2", 0.03)), "log_s": 0.5,
        }  # fmt: skip
        return sized(MshConfig(**(values | changed)))

    return make


def log(config: MshConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_a_short_run_lowers_the_loss_and_its_weights_code_as_the_log_says(
    config: Callable[..., MshConfig], photos: Path
) -> None:
    own = config(plan=(Stage("3", 0.14), Stage("2", 0.03)))
    assert Run(MshTask(own, CPU), own, CPU).go()
    losses = [row["loss"] for row in log(own) if "loss" in row and row["stage"] == "3"]
    assert losses[-1] < 0.9 * losses[0]  # the run is seconds, of whatever the machine has left
    held = {row["stage"]: row for row in log(own) if "held_bpp" in row}
    assert held.keys() == {"3", "2"}
    for quality in (3, 2):
        file = Path(own.out) / f"msh_q{quality}.safetensors"
        made = coded(zoo.with_tables(load_file(file)), quality, photos / "bsds_val_d.png")
        logged = held[str(quality)]
        # after seconds some symbols cost 30 bits by their density, 20 by the coder's escape
        assert made == pytest.approx((logged["held_bpp"], logged["held_psnr"]), rel=0.2)
        assert made[1] == pytest.approx(logged["held_psnr"], abs=0.05)
    with safe_open(Path(own.out) / "msh_q2.safetensors", "pt") as f:
        card = json.loads(f.metadata()["train"])
    assert card["N"] == 12
    assert card["steps"] == held["2"]["step"]
    assert "/" not in card["photos"]


def test_the_trainer_judges_the_shipped_weights_as_the_coder_does(
    config: Callable[..., MshConfig], photos: Path
) -> None:
    shipped = next(e for e in checkpoint.manifest() if e.quality == 2)
    own = config(init=str(checkpoint.WEIGHTS / shipped.file), plan=(Stage("2", 0.01),))
    assert (own.N, own.M) == (128, 192)
    task = MshTask(own, CPU)
    task.begin(0)
    judged = task.validate(own.plan[0])
    bpp, psnr = coded(checkpoint.load(shipped), 2, photos / "bsds_val_d.png")
    assert judged["held_bpp"] == pytest.approx(bpp, rel=0.03)  # two strings have two ends
    assert judged["held_psnr"] == pytest.approx(psnr, abs=0.01)


def coded(tensors: dict[str, Tensor], quality: int, file: Path) -> tuple[float, float]:
    """bpp and PSNR of a real encode, from its strings."""
    real = zoo.from_tensors(tensors, quality)
    x = codec.to_tensor(image.read(file.read_bytes(), 10**6))
    y_string, z_string, latents = real.hyperprior.encode(x, "exact")
    mse = float((real.synthesis(latents.y_hat) - x).square().mean())
    return 8 * (len(y_string) + len(z_string)) / x[0, 0].numel(), -10 * math.log10(mse)


def test_a_killed_run_goes_on_also_on_another_machine(
    config: Callable[..., MshConfig], tmp_path: Path
) -> None:
    own = config(plan=(Stage("3", 5.0),))
    command = [
        *(sys.executable, "-P", "-m", "models.train", "msh", "--photos", own.photos),
        *("--out", own.out, "--N", "12", "--M", "16", "--batch", "4", "--crop", "64"),
        *("--plan", "3:5", "--save-s", "0.3", "--log-s", "0.3"),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _rows(own) > 3, "rows in the log", 90)
            time.sleep(0.7)
        finally:
            process.send_signal(signal.SIGKILL)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(Path(own.out) / "checkpoint", elsewhere / "checkpoint")
    assert max(p.stat().st_size for p in elsewhere.rglob("*.*")) <= 16 << 20
    moved = config(plan=(Stage("3", 0.12),), out=str(elsewhere))
    run = Run(MshTask(moved, CPU), moved, CPU)
    killed = run.progress.steps
    assert killed > 0
    assert 0 < run.progress.spent < 7
    assert run.go()
    assert run.progress.steps > killed
    assert log(moved)[0]["step"] == killed
    assert (elsewhere / "msh_q3.safetensors").exists()


def test_the_tail_of_a_stage_trains_the_hyperprior_alone(config: Callable[..., MshConfig]) -> None:
    own = config(plan=(Stage("3", 0.01),), tail=1.0)
    task = MshTask(own, CPU)
    task.begin(0)
    run = Run(task, own, CPU)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    run._step(own.plan[0], 0.5)
    changed = {k for k, v in task.net.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("g_") for name in changed)
    assert {"h_a.0.weight", "h_s.4.weight", "entropy_bottleneck.matrices.0"} <= changed


def test_rescaled_latents_give_the_same_picture() -> None:
    torch.manual_seed(0)
    net = Hyperprior(8, 12).eval()
    x = torch.rand(1, 3, 64, 64)
    y, z, made = net.g_a(x), net.h_a(net.g_a(x)), net.g_s(net.g_a(x))
    prior = net.h_s(z)
    net.rescale(3.0)
    torch.testing.assert_close(net.g_a(x), 3 * y)
    torch.testing.assert_close(net.h_a(net.g_a(x)), z)
    torch.testing.assert_close(net.h_s(z), 3 * prior)
    torch.testing.assert_close(net.g_s(net.g_a(x)), made)


def test_densities_are_those_of_compressai() -> None:
    from compressai.entropy_models import (  # type: ignore[import-untyped]
        EntropyBottleneck as Bottleneck,
    )
    from compressai.entropy_models import GaussianConditional

    torch.manual_seed(0)
    ours, theirs = EntropyBottleneck(4), Bottleneck(4)
    theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
    ours.settle()
    theirs.update(force=True, update_quantiles=True)
    torch.testing.assert_close(ours.quantiles, theirs.quantiles, rtol=1e-3, atol=2e-3)
    z = torch.randint(-3, 4, (2, 4, 5, 5)).float() + ours.medians
    with torch.no_grad():
        theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
        _, expected = theirs.eval()(z)
    found = ours.likelihood(z).reshape(4, 2, 5, 5).transpose(0, 1)
    torch.testing.assert_close(found, expected)
    y, scales, means = torch.randn(50) * 4, torch.rand(50) * 5, torch.randn(50)
    _, expected = GaussianConditional(None).eval()(y[None], scales[None], means[None])
    rounded = torch.round(y - means) + means
    torch.testing.assert_close(gaussian_likelihood(rounded, scales, means)[None], expected)


def test_gdn_never_leaves_the_range_where_it_learns() -> None:
    net = Hyperprior(8, 12)
    with torch.no_grad():
        net.g_a[1].gamma.fill_(-1)
    net.project()
    net.g_a[1](torch.rand(1, 8, 4, 4)).sum().backward()
    assert bool((net.g_a[1].gamma.grad != 0).all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"plan": (Stage("9", 1.0),)}, "a quality of"), ({"crop": 100}, "multiple of 64")],
)
def test_wrong_settings_are_named(
    config: Callable[..., MshConfig], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MshTask(config(**changed), CPU)


def test_weights_of_another_kind_are_refused(
    config: Callable[..., MshConfig], lpips_file: Path
) -> None:
    with pytest.raises(WeightsError, match="no mean-scale hyperprior"):
        config(init=str(lpips_file))
    assert LAMBDA[1] < LAMBDA[2] < LAMBDA[3]


def _rows(config: MshConfig) -> int:
    file = Path(config.out) / "log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("alive", [False, True])
def test_a_widened_codec_computes_the_same_and_its_live_channels_can_learn(
    photo: image.Pixels, alive: bool
) -> None:
    torch.manual_seed(0)
    small, x = Hyperprior(8, 12), codec.to_tensor(photo[:128, :192])
    small.rescale(40)  # latents that are not all zero
    small.entropy_bottleneck.settle()
    with torch.no_grad():
        small.g_s[1].gamma.add_(0.01)  # channels that normalise each other
        wide = Hyperprior(12, 20)
        wide.load_state_dict(widened(small.state_dict(), 12, 20, alive))
        y, bits, x_hat = small.g_a(x), *small.eval()(x)
        wide_y, wide_bits, wide_x_hat = wide.g_a(x), *wide.eval()(x)
    assert y.abs().max() > 1
    torch.testing.assert_close(wide_y[:, :12], y)
    assert not wide_y[:, 12:].any()
    torch.testing.assert_close(wide_x_hat, x_hat)
    assert float(wide_bits) == pytest.approx(float(bits), rel=0.02)  # of 4 idle z channels
    bits, made = wide.train()(x)
    (bits / x.numel() + (made - x).square().mean()).backward()
    ins = {"g_a.2": 1, "g_a.4": 1, "g_s.2": 0, "g_s.4": 0}  # the axis that reads
    for name, axis in ins.items():
        grad = wide.get_parameter(f"{name}.weight").grad
        assert grad is not None
        assert bool(grad.narrow(axis, 8, 4).any()) == alive


def test_a_codec_is_not_narrowed() -> None:
    with pytest.raises(WeightsError, match="8 and 12 channels cannot be widened to 8 and 10"):
        widened(Hyperprior(8, 12).state_dict(), 8, 10)
