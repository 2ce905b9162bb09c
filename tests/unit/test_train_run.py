"""A run: its clock, average, fall-back, checkpoints and ranks, on a tiny network."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.errors import WeightsError
from models.train import shards
from models.train.config import RunConfig, Stage
from models.train.distributed import Ranks
from models.train.run import Play, Run, Step, cosine
from models.train.soap import Soap

CPU = Ranks(0, 1, torch.device("cpu"))
ADAMW = partial(torch.optim.AdamW, fused=True)


class Regression:
    """A convolution that learns to double; `at` may interfere with a step."""

    def __init__(
        self,
        at: Callable[[Step, nn.Module], float] = lambda step, net: 1.0,
        optimiser: Callable[..., Optimizer] = ADAMW,
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.at, self._optimiser = at, optimiser
        self.begun: list[int] = []
        self.rates: list[float] = []
        self.cards: list[dict[str, Any]] = []

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def begin(self, index: int) -> None:
        self.begun.append(index)

    def optimiser(self, player: str) -> Optimizer:
        return self._optimiser(self.net.parameters(), 1e-3)

    def rate(self, step: int, part: float, stage: Stage) -> float:
        return 1e-2

    def plays(self, step: Step) -> Iterator[Play]:
        x = torch.randn(2, 4, 8, 8, generator=step.own)
        loss = (self.net(x) - 2 * x).square().mean() * self.at(step, self.net)
        yield Play("net", loss, {"loss": loss.detach()})

    def validate(self, stage: Stage) -> dict[str, float]:
        return {"held_weight": float(self.net.weight.detach().abs().mean())}

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        self.cards.append(card)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(out=str(tmp_path), plan=(Stage("only", 1.0),), ema=0.99, seed=5)


def log(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def stop_at(number: int) -> Callable[[Step, nn.Module], float]:
    def at(step: Step, net: nn.Module) -> float:
        if step.number == number:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    return at


def weights(run: Run) -> dict[str, Tensor]:
    state, _ = shards.load(run.out / "checkpoint")
    return {f"{part}.{name}": t for part, tensors in state.items() for name, t in tensors.items()}


def test_a_stage_lasts_its_minutes_and_the_loss_falls(config: RunConfig) -> None:
    config = replace(config, plan=(Stage("a", 0.03), Stage("b", 0.02)), log_s=0.3)
    task = Regression()
    run = Run(task, config, CPU)
    assert run.go()
    assert 3.0 <= run.progress.total < 4.0
    assert task.begun == [0, 1]
    rows = [row for row in log(config) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert [row["stage"] for row in log(config) if "held_weight" in row] == ["a", "b"]
    card = task.cards[-1]
    assert card["steps"] == run.progress.steps
    assert card["device"] == "CPU"
    assert "out" not in card


@pytest.mark.parametrize("optimiser", [ADAMW, Soap], ids=["adamw", "soap"])
def test_a_stopped_run_ends_as_one_that_was_not_stopped(
    config: RunConfig, tmp_path: Path, optimiser: Callable[..., Optimizer]
) -> None:
    whole = Run(Regression(stop_at(39), optimiser), config, CPU)
    assert not whole.go()
    parts = replace(config, out=str(tmp_path / "parts"))
    assert not Run(Regression(stop_at(16), optimiser), parts, CPU).go()
    resumed = Run(Regression(stop_at(39), optimiser), parts, CPU)
    assert resumed.progress.number == 17
    assert resumed.progress.spent < 10
    assert not resumed.go()
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_copied_checkpoint_goes_on_elsewhere_and_a_finished_one_is_done(
    config: RunConfig, tmp_path: Path
) -> None:
    config = replace(config, plan=(Stage("a", 0.005),))
    first = Run(Regression(), config, CPU)
    assert first.go()
    (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "other/checkpoint")
    task = Regression()
    second = Run(task, replace(config, out=str(tmp_path / "other")), CPU)
    assert second.go()
    assert second.progress == first.progress
    assert task.cards  # its weights are written again where it now is


def test_a_finished_run_goes_on_with_a_longer_plan(config: RunConfig) -> None:
    config = replace(config, plan=(Stage("a", 0.005),))
    assert Run(Regression(), config, CPU).go()
    task = Regression()
    longer = Run(task, replace(config, plan=(*config.plan, Stage("b", 0.005))), CPU)
    assert task.begun == [1]  # as if it had been planned
    assert longer.go()
    assert longer.progress.stage == 2


def test_a_plan_that_begins_otherwise_is_refused_before_it_overwrites_anything(
    config: RunConfig,
) -> None:
    a, b, c = (Stage(name, 0.005) for name in "abc")
    own = replace(config, plan=(a, b))
    assert Run(Regression(), own, CPU).go()
    for plan in ((b,), (b, a), (a,), (a, c, b)):
        with pytest.raises(WeightsError, match="plan begins with a, b"):
            Run(Regression(), replace(config, plan=plan), CPU)
    assert Run(Regression(), replace(config, plan=(a, replace(b, minutes=1), c)), CPU).go()


def test_a_stage_that_has_begun_is_part_of_the_plan(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).go()
    with pytest.raises(WeightsError, match="plan begins with only"):
        Run(Regression(), replace(config, plan=(Stage("another", 1.0),)), CPU)


def test_a_checkpoint_of_another_optimiser_is_refused(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).go()
    with pytest.raises(WeightsError, match="optimiser is adam"):
        Run(Regression(), replace(config, optimiser="soap"), CPU)


def test_a_checkpoint_of_another_network_is_refused(config: RunConfig) -> None:
    Run(Regression(stop_at(2)), config, CPU).go()
    other = Regression()
    other.net = nn.Conv2d(4, 8, 3)
    with pytest.raises(WeightsError, match="another configuration"):
        Run(other, config, CPU)


def test_a_loss_that_is_not_finite_falls_back_and_later_halves_the_rate(config: RunConfig) -> None:
    rates: list[float] = []

    def at(step: Step, net: nn.Module) -> float:
        rates.append(run.optimisers["net"].param_groups[0]["lr"])
        if step.number == 45:
            signal.raise_signal(signal.SIGTERM)
        return float("nan") if step.number in {10, 20, 30} else 1.0

    run = Run(Regression(at), config, CPU)
    run.go()
    assert [row["not_finite"] for row in log(config) if "not_finite" in row] == [11, 21, 31]
    assert [rates[i] for i in (9, 19, 29, 39)] == [1e-2, 1e-2, 5e-3, 2.5e-3]
    assert all(bool(t.isfinite().all()) for t in weights(run).values())


def test_weights_that_are_not_finite_are_replaced_by_the_average(config: RunConfig) -> None:
    run = Run(Regression(stop_at(20)), config, CPU)
    with torch.no_grad():
        run.task.modules["net"].get_parameter("bias").fill_(float("nan"))
    run.go()
    assert run.progress.setbacks == 1
    assert all(bool(t.isfinite().all()) for t in weights(run).values())


def test_tensorboard_has_the_curves_of_the_log(config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, plan=(Stage("a", 0.02),), log_s=0.2)
    Run(Regression(), config, CPU).go()
    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    logged = [row["loss"] for row in log(config) if "loss" in row]
    assert [e.value for e in events.Scalars("stage a/loss")] == pytest.approx(logged)
    assert len(events.Scalars("held out/held_weight")) == 1


def test_two_ranks_end_with_equal_weights(tmp_path: Path) -> None:
    """`torchrun` starts this file twice; see its last lines."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(__file__, str(tmp_path)),
    ]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    first, second = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    assert first["steps"] == second["steps"] >= 25
    assert first["crops"] != second["crops"]
    for name in ("weight", "bias"):
        assert torch.equal(first[name], second[name])
    assert first["unused"] == second["unused"] == 1  # no gradient was made up for it to decay by
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # rank 0's alone


def test_the_learning_rate_holds_and_then_falls() -> None:
    assert [round(cosine(p, hold=0.4), 3) for p in (0, 0.4, 0.7, 1.0, 1.1)] == [
        1,
        1,
        0.51,
        0.02,
        0.02,
    ]


def _rank(folder: Path) -> None:
    """One of two processes: rank 1 alone meets a NaN and the signal to stop."""
    ranks = Ranks.join("cpu")
    first: list[float] = []

    def at(step: Step, net: nn.Module) -> float:
        first.append(float(torch.rand((), generator=step.own)))
        if ranks.rank == 1 and step.number == 25:
            signal.raise_signal(signal.SIGTERM)
        return float("nan") if ranks.rank == 1 and step.number == 12 else 1.0

    task = Regression(at)
    task.net.register_parameter("unused", nn.Parameter(torch.ones(())))
    with torch.no_grad():
        task.net.weight.add_(ranks.rank)  # as if the ranks had started apart
    config = RunConfig(out=str(folder), plan=(Stage("only", 1.0),), ema=0.9)
    run = Run(task, config, ranks)
    assert not run.go()
    assert run.progress.setbacks == 1
    own = {"steps": run.progress.steps, "crops": first[:3], **task.net.state_dict()}
    torch.save(own, folder / f"rank{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
