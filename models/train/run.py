"""A run: stages in minutes, carried on from its checkpoint after any kind of end.

What is trained is a `Task`; the clock, the average, the fall-back, the checkpoints and the log are
the same for all and live here.
"""

import hashlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.errors import WeightsError
from models.train import shards
from models.train.config import RunConfig, Stage, card
from models.train.distributed import Ranks
from models.train.report import Report

LOOK_CUDA = 10
"""Steps between two looks at a CUDA device: reading a number there stops the queue of kernels."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a stage; `own` and `shared` are drawn from seed and step, so need no saving."""

    stage: Stage
    number: int  # within the stage
    part: float  # of the stage's minutes, in [0, 1]
    own: torch.Generator  # on the device, another one on every rank
    shared: random.Random  # the same on all ranks: for choices of what is trained


class Play(NamedTuple):
    """A loss, the module whose optimiser follows it, and figures for the log (0-dim, detached)."""

    player: str
    loss: Tensor
    figures: dict[str, Tensor]


class Task(Protocol):
    """What is trained."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """On the device, by player; their averages replace them after a stage."""

    def begin(self, index: int) -> None:
        """Prepare `modules` for the plan's stage `index`; not called where a run resumes in it."""

    def optimiser(self, player: str) -> Optimizer:
        """A new one. Groups may carry `relative`, a factor to the run's learning rate."""

    def rate(self, step: int, part: float, stage: Stage) -> float:
        """Learning rate."""

    def plays(self, step: Step) -> Iterator[Play]:
        """The losses of one step; what follows a `yield` sees that loss's update made."""

    def validate(self, stage: Stage) -> dict[str, float]:
        """Figures on held-out photographs, with `modules` as they are."""

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """Write `modules` as weights into the run's folder, atomically."""


@dataclass(slots=True)
class Progress:
    """Where a run is; saved with it."""

    stage: int = 0
    spent: float = 0.0  # seconds of the stage, while running
    total: float = 0.0  # seconds of all stages
    number: int = 0  # steps of the stage
    steps: int = 0  # steps of all stages
    begun: int = 0  # the last stage that `begin` was called for
    setbacks: int = 0  # falls back to the average in this stage


class Every:
    """True now and then."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def due(self, now: float) -> bool:
        """Whether `seconds` have passed since it last was."""
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class Run:
    """The state of a run. `go` trains until the plan is fulfilled or someone asks to stop."""

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks) -> None:
        self.task, self.config, self.ranks = task, config, ranks
        self.out = Path(config.out)
        self.report = Report(self.out, ranks.first)
        self.progress = Progress()
        self._asked = self._stopping = False  # by a signal to this rank; by agreement of all
        self.look = LOOK_CUDA if ranks.device.type == "cuda" else 1
        self._failed = torch.zeros((), dtype=torch.bool, device=ranks.device)
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._means: dict[str, float] = {}
        if shards.exists(self.out / "checkpoint"):
            self._resume()
        else:
            task.begin(0)
            ranks.equalise(task.modules.values())
            self.average = _copies(task.modules)
            self.optimisers = self._optimisers()

    def go(self) -> bool:
        """Whether the plan is fulfilled; False after SIGTERM or SIGINT, with everything saved."""
        with _signals(self._stop):
            self.ranks.wait()  # no rank writes while another still reads
            self.save()  # a folder that cannot be written is known now, not after minutes
            while self.progress.stage < len(self.config.plan) and not self._stopping:
                self._run_stage(self.config.plan[self.progress.stage])
        self.report.close()
        return self.progress.stage == len(self.config.plan)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _run_stage(self, stage: Stage) -> None:
        p, budget = self.progress, stage.minutes * 60
        log, save = Every(self.config.log_s), Every(self.config.save_s)
        for module in self.task.modules.values():
            module.train()
        before: float | None = None
        while p.spent < budget and not self._stopping:
            self._step(stage, p.spent / budget)
            if p.number % self.look:
                continue
            now = time.monotonic()
            # the first steps choose and compile kernels: that is not the stage's time
            self._look(now - before if before is not None else 0.0)
            before = now
            if log.due(now):
                self._log(stage)
            if save.due(now):
                self.save()
            self.report.progress(stage.name, p.spent, budget, {"step": p.steps, **self._means})
        self._log(stage)
        if not self._stopping:
            self._end_stage(stage)
        self.report.end_stage()
        self.save()

    def _look(self, seconds: float) -> None:
        """At the last steps' outcome, on all ranks: follow it, or fall back."""
        told = self.ranks.agree(self._failed, self._asked, seconds)
        self.progress.spent += told.seconds
        self.progress.total += told.seconds
        self._stopping = told.stopping
        if told.finite:
            self._follow()
        else:
            self._fall_back()

    def _step(self, stage: Stage, part: float) -> None:
        p = self.progress
        rate = self.task.rate(p.number, part, stage) * 0.5 ** max(0, p.setbacks - 1)
        seeds = [_seed(self.config.seed, p.steps, who) for who in (self.ranks.rank, "all")]
        own = torch.Generator(self.ranks.device).manual_seed(seeds[0])
        for play in self.task.plays(Step(stage, p.number, part, own, random.Random(seeds[1]))):
            self._update(play, rate)
            for name, value in play.figures.items():
                total, count = self._sums.get(name, (torch.zeros_like(value), 0))
                self._sums[name] = total + value, count + 1
        p.number, p.steps = p.number + 1, p.steps + 1

    def _update(self, play: Play, rate: float) -> None:
        optimiser = self.optimisers[play.player]
        parameters = list(self.task.modules[play.player].parameters())
        optimiser.zero_grad(set_to_none=True)
        play.loss.backward()  # type: ignore[no-untyped-call]
        self.ranks.average(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("relative", 1.0)
        optimiser.step()
        self._failed |= ~(torch.isfinite(play.loss.detach()) & torch.isfinite(norm))

    def _follow(self) -> None:
        """Move the average towards weights of which every update was finite."""
        number = self.progress.number
        decay = min(self.config.ema, (1 + number) / (10 + number)) ** self.look
        for name, module in self.task.modules.items():
            kept, state = self.average[name], module.state_dict()
            floats = [k for k, v in state.items() if v.is_floating_point()]
            torch._foreach_lerp_([kept[k] for k in floats], [state[k] for k in floats], 1 - decay)

    def _fall_back(self) -> None:
        """To the averaged weights; where that happens again, at half the rate of before."""
        p = self.progress
        p.setbacks += 1
        self.report.row(not_finite=p.steps, setbacks=p.setbacks)
        self._load_average()
        self.optimisers = self._optimisers()
        self._sums.clear()
        self._failed.zero_()

    def _end_stage(self, stage: Stage) -> None:
        self._load_average()
        row = {"stage": stage.name, "step": self.progress.steps, "s": round(self.progress.spent)}
        with torch.compiler.set_stance("force_eager"):  # other shapes than the steps'
            figures = self.task.validate(stage)
        self.report.row(**row, **figures)
        self.report.scalars("held out", figures, self.progress.steps)
        self._export(stage)
        p = self.progress
        p.stage, p.spent, p.number, p.setbacks = p.stage + 1, 0.0, 0, 0
        self._begin()

    def _begin(self) -> None:
        """The plan's next stage, if there is one: now, or when a run with a longer plan resumes."""
        p = self.progress
        if p.begun < p.stage < len(self.config.plan):
            self.task.begin(p.stage)
            self.average = _copies(self.task.modules)
            self.optimisers = self._optimisers()
            p.begun = p.stage

    def _export(self, stage: Stage) -> None:
        """The averaged weights; the trained ones are back when it returns."""
        if self.ranks.first:
            p, device = self.progress, self.ranks.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            facts = {"steps": p.steps, "minutes": round(p.total / 60, 1), "device": name}
            with self._averaged():
                self.task.export(stage, card(self.config) | facts | {"devices": self.ranks.world})

    def _log(self, stage: Stage) -> None:
        """Means since the last line; reading them waits for the device."""
        sums, self._sums = self._sums, {}
        if not sums:
            return
        self._means = {k: float(f"{float(total) / n:.4g}") for k, (total, n) in sums.items()}
        p = self.progress
        self.report.row(stage=stage.name, step=p.steps, s=round(p.spent), **self._means)
        self.report.scalars(f"stage {stage.name}", self._means, p.steps)

    def save(self) -> None:
        """A checkpoint, and the averaged weights beside it."""
        if not self.ranks.first:
            return
        state: shards.State = {}
        for name, module in self.task.modules.items():
            state[name] = module.state_dict()
            state[f"{name}_average"] = self.average[name]
            state[f"{name}_optimiser"] = _moments(self.optimisers[name])
        facts = {"progress": asdict(self.progress), "config": card(self.config)}
        shards.save(self.out / "checkpoint", state, facts)
        self._export(self.config.plan[min(self.progress.stage, len(self.config.plan) - 1)])

    def _resume(self) -> None:
        state, facts = shards.load(self.out / "checkpoint", self.ranks.device)
        self.progress = Progress(**{"begun": facts["progress"]["stage"]} | facts["progress"])
        before = facts["config"].get("optimiser", self.config.optimiser)
        if before != self.config.optimiser:
            raise WeightsError(f"{self.out}: this run's optimiser is {before}")
        begun = self.progress.stage + (self.progress.number > 0)
        names = [stage["name"] for stage in facts["config"]["plan"]][:begun]
        if [stage.name for stage in self.config.plan][:begun] != names:
            raise WeightsError(f"{self.out}: this run's plan begins with {', '.join(names)}")
        try:
            for name, module in self.task.modules.items():
                module.load_state_dict(state[name])
            self.average = _copies(self.task.modules)  # in the modules' memory format
            for name, kept in self.average.items():
                for key, value in state[f"{name}_average"].items():
                    kept[key].copy_(value)
            self.optimisers = self._optimisers()
            for name, optimiser in self.optimisers.items():
                _remember(optimiser, state[f"{name}_optimiser"])
        except (KeyError, RuntimeError) as e:
            raise WeightsError(f"{self.out}: a run of another configuration: {e}") from e
        self._begin()
        self.ranks.equalise(self.task.modules.values())
        p = self.progress
        self.report.row(resumed=p.stage, s=round(p.spent), step=p.steps)

    def _optimisers(self) -> dict[str, Optimizer]:
        return {name: self.task.optimiser(name) for name in self.task.modules}

    def _load_average(self) -> None:
        for name, module in self.task.modules.items():
            module.load_state_dict(self.average[name])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        own = _copies(self.task.modules)
        self._load_average()
        try:
            yield
        finally:
            for name, module in self.task.modules.items():
                module.load_state_dict(own[name])


def cosine(part: float, hold: float = 0.0, floor: float = 0.02) -> float:
    """Factor to a learning rate: 1 until `hold`, then half a cosine down to `floor` at 1."""
    fall = min(max(part - hold, 0.0) / (1 - hold), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fall))


def _seed(*of: object) -> int:
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _copies(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {k: v.detach().clone() for k, v in module.state_dict().items()}
        for name, module in modules.items()
    }


def _moments(optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as `parameter/name`."""
    state = optimiser.state_dict()["state"]
    return {f"{i}/{key}": v for i, values in state.items() for key, v in values.items()}


def _remember(optimiser: Optimizer, moments: Mapping[str, Tensor]) -> None:
    """The inverse of `_moments`; the kernels need each moment in its parameter's memory format."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, key = name.partition("/")
        like = parameters[int(number)]
        same = value.shape == like.shape and value.dim()
        placed = torch.empty_like(like).copy_(value) if same else value
        state.setdefault(int(number), {})[key] = placed
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


@contextmanager
def _signals(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`stop` answers SIGTERM and SIGINT."""
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
