"""The training loop on a tiny network: stages, averages, NaN, checkpoints and ranks."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.errors import WeightsError
from models.train import run as run_module
from models.train import shards
from models.train.config import RunConfig, Stage
from models.train.distributed import ProcessGroup
from models.train.run import Run
from models.train.soap import Soap
from models.train.task import TrainingStep, Update, cosine
from tests.support.forked import Forked
from tests.support.service import free_port

CPU = ProcessGroup(0, 1, torch.device("cpu"))
ADAMW = partial(torch.optim.AdamW, fused=True)


class Regression:
    """A convolution that learns to double its input.

    `hook` is called in each step and returns a factor to the loss.
    """

    def __init__(
        self,
        hook: Callable[[TrainingStep], float] = lambda step: 1.0,
        optimiser: Callable[..., Optimizer] = ADAMW,
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.hook, self._optimiser = hook, optimiser
        self.begun: list[int] = []
        self.cards: list[dict[str, Any]] = []

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def begin(self, index: int) -> None:
        self.begun.append(index)

    def optimiser(self, module: str) -> Optimizer:
        return self._optimiser(self.net.parameters(), 1e-3)

    def learning_rate(self, step: int, fraction: float, stage: Stage) -> float:
        return 1e-2 * cosine(fraction)

    def updates(self, step: TrainingStep) -> Iterator[Update]:
        x = torch.randn(2, 4, 8, 8, generator=step.generator)
        loss = (self.net(x) - 2 * x).square().mean() * self.hook(step)
        yield Update("net", loss, {"loss": loss.detach()})

    def validate(self, stage: Stage) -> dict[str, float]:
        return {"held_weight": float(self.net.weight.detach().abs().mean())}

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        self.cards.append(card)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(out=str(tmp_path), plan=(Stage("only", steps=1000),), ema=0.99, seed=5)


def log(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def stop_at(number: int) -> Callable[[TrainingStep], float]:
    """A hook that sends SIGTERM to this process in step `number`."""

    def hook(step: TrainingStep) -> float:
        if step.number == number:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    return hook


class Killed(Exception):
    """Ends a run as SIGKILL does: nothing is saved."""


def kill_at(number: int) -> Callable[[TrainingStep], float]:
    """A hook that ends the run in step `number`."""

    def hook(step: TrainingStep) -> float:
        if step.number == number:
            raise Killed
        return 1.0

    return hook


def checkpoint(run: Run) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint: weights, averages and moments."""
    state, _ = shards.load(run.out / "checkpoint")
    return {f"{part}.{name}": t for part, tensors in state.items() for name, t in tensors.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every step takes 20 ms."""
    ticks = count()
    times = SimpleNamespace(monotonic=lambda: next(ticks) / 50)
    monkeypatch.setattr(run_module, "time", times)


@pytest.mark.usefixtures("clock")
def test_a_stage_lasts_its_minutes_and_the_loss_falls(config: RunConfig) -> None:
    config = replace(config, plan=(Stage("a", 0.03), Stage("b", 0.02)), log_s=0.3)
    task = Regression()
    run = Run(task, config, CPU)
    assert run.train()
    assert 3.0 <= run.progress.total < 3.05
    # the first step of each stage is not counted; 0.02 is not exact in binary
    assert run.progress.steps == pytest.approx(91 + 61, abs=2)
    assert task.begun == [0, 1]
    rows = [row for row in log(config) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert [row["stage"] for row in log(config) if "held_weight" in row] == ["a", "b"]
    card = task.cards[-1]
    assert card["steps"] == run.progress.steps
    assert card["device"] == "CPU"
    assert "out" not in card


def test_a_stage_lasts_its_steps_and_the_learning_rate_follows_them(config: RunConfig) -> None:
    rates: list[float] = []

    def hook(step: TrainingStep) -> float:
        rates.append(task.learning_rate(step.number, step.fraction, step.stage))
        return 1.0

    config = replace(config, plan=(Stage("a", steps=20), Stage("b", 0.0), Stage("c", steps=5)))
    task = Regression(hook)
    run = Run(task, config, CPU)
    assert run.train()
    assert (run.progress.stage, run.progress.steps) == (3, 25)
    assert task.begun == [0, 1, 2]
    expected = [1e-2 * cosine(i / n) for n in (20, 5) for i in range(n)]
    assert rates == pytest.approx(expected)
    assert task.cards[-1]["plan"][0] == {"name": "a", "minutes": 0.0, "steps": 20}


def test_the_last_steps_of_a_stage_are_checked_also_between_two_syncs(config: RunConfig) -> None:
    task = Regression(lambda step: float("nan") if step.number == 23 else 1.0)
    run = Run(task, replace(config, plan=(Stage("a", steps=25),)), CPU)
    run.sync_every = 10  # as on CUDA
    assert run.train()
    assert [row["not_finite"] for row in log(config) if "not_finite" in row] == [25]
    assert run.progress.steps == 25
    assert all(bool(t.isfinite().all()) for t in checkpoint(run).values())


def test_progress_is_shown_in_the_unit_of_the_stage(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.train.report.tqdm", None)
    plan = (Stage("a", steps=3), Stage("b", minutes=0.0001))
    assert Run(Regression(), replace(config, plan=plan), CPU).train()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" step ")[0] for line in lines] == [
        "stage a: 1 of 3 steps",
        "stage b: 0 of 0 s",
    ]


@pytest.mark.parametrize("optimiser", [ADAMW, Soap], ids=["adamw", "soap"])
@pytest.mark.parametrize("last", [39, None], ids=["stopped again", "to its end"])
def test_a_stopped_and_killed_run_equals_one_without_interruption(
    config: RunConfig, tmp_path: Path, optimiser: Callable[..., Optimizer], last: int | None
) -> None:
    config = replace(config, plan=(Stage("only", steps=60),))
    hook = stop_at(-1 if last is None else last)
    whole = Run(Regression(hook, optimiser), config, CPU)
    assert whole.train() == (last is None)
    parts = replace(config, out=str(tmp_path / "parts"))
    assert not Run(Regression(stop_at(16), optimiser), parts, CPU).train()
    with pytest.raises(Killed):
        Run(Regression(kill_at(25), optimiser), parts, CPU).train()
    resumed = Run(Regression(hook, optimiser), parts, CPU)
    assert resumed.progress.number == 17
    assert resumed.progress.spent < 10
    assert resumed.train() == (last is None)
    expected, tensors = checkpoint(whole), checkpoint(resumed)
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)


def test_a_copied_checkpoint_of_a_finished_run_is_complete_elsewhere(
    config: RunConfig, tmp_path: Path
) -> None:
    config = replace(config, plan=(Stage("a", steps=3),))
    first = Run(Regression(), config, CPU)
    assert first.train()
    (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "other/checkpoint")
    task = Regression()
    second = Run(task, replace(config, out=str(tmp_path / "other")), CPU)
    assert second.train()
    assert second.progress == first.progress
    assert task.cards  # the weights are exported into the new folder


def test_a_finished_run_continues_with_a_longer_plan(config: RunConfig) -> None:
    config = replace(config, plan=(Stage("a", steps=3),))
    assert Run(Regression(), config, CPU).train()
    task = Regression()
    longer = Run(task, replace(config, plan=(*config.plan, Stage("b", steps=3))), CPU)
    assert task.begun == [1]  # as if the plan had always had the stage
    assert longer.train()
    assert longer.progress.stage == 2


def test_a_plan_with_other_first_stages_is_refused_before_anything_is_overwritten(
    config: RunConfig,
) -> None:
    a, b, c = (Stage(name, steps=3) for name in "abc")
    assert Run(Regression(), replace(config, plan=(a, b)), CPU).train()
    for plan in ((b,), (b, a), (a,), (a, c, b)):
        with pytest.raises(WeightsError, match="plan begins with a, b"):
            Run(Regression(), replace(config, plan=plan), CPU)
    assert Run(Regression(), replace(config, plan=(a, Stage("b", minutes=1), c)), CPU).train()


def test_a_stage_that_has_begun_cannot_be_replaced(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).train()
    with pytest.raises(WeightsError, match="plan begins with only"):
        Run(Regression(), replace(config, plan=(Stage("another", steps=9),)), CPU)


def test_a_checkpoint_of_another_optimiser_is_refused(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).train()
    with pytest.raises(
        WeightsError, match="--optimiser is soap; the checkpoint's optimiser is adam"
    ):
        Run(Regression(), replace(config, optimiser="soap"), CPU)


def test_a_checkpoint_of_another_network_is_refused(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).train()
    other = Regression()
    other.net = nn.Conv2d(4, 8, 3)
    with pytest.raises(WeightsError, match="another configuration"):
        Run(other, config, CPU)


def test_a_loss_of_nan_restores_the_average_and_halves_the_rate_when_repeated(
    config: RunConfig,
) -> None:
    rates: list[float] = []

    def hook(step: TrainingStep) -> float:
        rates.append(run.optimisers["net"].param_groups[0]["lr"])
        if step.number == 45:
            signal.raise_signal(signal.SIGTERM)
        return float("nan") if step.number in {10, 20, 30} else 1.0

    task = Regression(hook)
    task.learning_rate = lambda *_: 1e-2  # type: ignore[method-assign]
    run = Run(task, config, CPU)
    run.train()
    assert [row["not_finite"] for row in log(config) if "not_finite" in row] == [11, 21, 31]
    assert [rates[i] for i in (9, 19, 29, 39)] == [1e-2, 1e-2, 5e-3, 2.5e-3]
    assert all(bool(t.isfinite().all()) for t in checkpoint(run).values())


def test_weights_that_are_not_finite_are_replaced_by_the_average(config: RunConfig) -> None:
    run = Run(Regression(stop_at(20)), config, CPU)
    with torch.no_grad():
        run.task.modules["net"].get_parameter("bias").fill_(float("nan"))
    run.train()
    assert run.progress.setbacks == 1
    assert all(bool(t.isfinite().all()) for t in checkpoint(run).values())


def test_tensorboard_has_the_curves_of_the_log(config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, plan=(Stage("a", steps=20),), log_s=0.0)
    Run(Regression(), config, CPU).train()
    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    logged = [row["loss"] for row in log(config) if "loss" in row]
    assert len(logged) == 20
    assert [e.value for e in events.Scalars("stage a/loss")] == pytest.approx(logged)
    assert len(events.Scalars("held out/held_weight")) == 1


def test_two_ranks_end_with_equal_weights(tmp_path: Path) -> None:
    """Runs `_rank` below in two processes that have the variables that `torchrun` sets."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        Forked(
            partial(_rank, tmp_path),
            os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            tmp_path / f"rank{rank}.log",
        )
        for rank in range(2)
    ]
    statuses = [rank.wait(120) for rank in ranks]
    assert statuses == [0, 0], [(tmp_path / f"rank{i}.log").read_text() for i in range(2)]
    first, second = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    assert first["steps"] == second["steps"] >= 25
    assert first["crops"] != second["crops"]
    for name in ("weight", "bias"):
        assert torch.equal(first[name], second[name])
    assert first["unused"] == second["unused"] == 1  # no gradient, so no weight decay either
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # only rank 0 writes


def test_the_learning_rate_holds_and_then_falls() -> None:
    factors = [round(cosine(p, hold=0.4), 3) for p in (0, 0.4, 0.7, 1.0, 1.1)]
    assert factors == [1, 1, 0.51, 0.02, 0.02]


def _rank(folder: Path) -> int:
    """Train in one of two processes; only rank 1 gets a NaN and the signal to stop."""
    group = ProcessGroup.join("cpu")
    draws: list[float] = []

    def hook(step: TrainingStep) -> float:
        draws.append(float(torch.rand((), generator=step.generator)))
        if group.rank == 1 and step.number == 25:
            signal.raise_signal(signal.SIGTERM)
        return float("nan") if group.rank == 1 and step.number == 12 else 1.0

    task = Regression(hook)
    task.net.register_parameter("unused", nn.Parameter(torch.ones(())))
    with torch.no_grad():
        task.net.weight.add_(group.rank)  # ranks start with different weights
    config = RunConfig(out=str(folder), plan=(Stage("only", steps=1000),), ema=0.9)
    run = Run(task, config, group)
    assert not run.train()
    assert run.progress.setbacks == 1
    result = {"steps": run.progress.steps, "crops": draws[:3], **task.net.state_dict()}
    torch.save(result, folder / f"rank{group.rank}.pt")
    group.leave()
    return 0
