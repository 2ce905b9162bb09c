"""The training loop: stages of a given time or number of steps, resumable from checkpoints.

`Run` handles clock, averaged weights, recovery from NaN, checkpoints and log for any `Task`.
"""

import hashlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.errors import WeightsError
from models.train import shards
from models.train.config import RunConfig, Stage, card
from models.train.distributed import ProcessGroup
from models.train.report import Report
from models.train.task import Task, TrainingStep, Update

SYNC_EVERY_CUDA = 10
"""Steps between two reads of results from a CUDA device, because each waits for all its kernels."""


@dataclass(slots=True)
class Progress:
    """Position of a run. The fields are saved in checkpoints under these names."""

    stage: int = 0  # index in the plan
    spent: float = 0.0  # seconds of training in the current stage
    total: float = 0.0  # seconds in all stages
    number: int = 0  # steps in the current stage
    steps: int = 0  # steps in all stages
    begun: int = 0  # last stage for which `Task.begin` was called
    setbacks: int = 0  # number of times that this stage returned to the averaged weights

    def done(self, stage: Stage) -> float:
        """Seconds or steps of the current stage that are complete, in the stage's unit."""
        return self.spent if stage.steps is None else self.number


class Interval:
    """A timer that fires at most once per `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def due(self, now: float) -> bool:
        """Return True, and restart the timer, if `seconds` have passed since it last fired."""
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class Run:
    """A training run. It resumes from the checkpoint in the output folder if there is one."""

    def __init__(self, task: Task, config: RunConfig, group: ProcessGroup) -> None:
        """Raises `WeightsError` if the checkpoint belongs to another configuration."""
        self.task, self.config, self.group = task, config, group
        self.out = Path(config.out)
        self.report = Report(self.out, group.is_first)
        self.progress = Progress()
        self._signalled = False  # this rank received a stop signal
        self._stopping = False  # all ranks know that one of them did
        self.sync_every = SYNC_EVERY_CUDA if group.device.type == "cuda" else 1
        self._failed = torch.zeros((), dtype=torch.bool, device=group.device)
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._means: dict[str, float] = {}
        if shards.exists(self.out / "checkpoint"):
            self._resume()
        else:
            task.begin(0)
            group.broadcast(task.modules.values())
            self.average = _copies(task.modules)
            self.optimisers = self._new_optimisers()

    def train(self) -> bool:
        """Train until the plan is complete; then return True.

        After SIGTERM or SIGINT save a checkpoint and return False.
        """
        with _signals(self._on_signal):
            self.group.barrier()  # no rank writes a checkpoint while another still reads one
            self.save()  # so that an unwritable folder is noticed before training
            while self.progress.stage < len(self.config.plan) and not self._stopping:
                self._run_stage(self.config.plan[self.progress.stage])
        self.report.close()
        return self.progress.stage == len(self.config.plan)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def _run_stage(self, stage: Stage) -> None:
        p = self.progress
        log, save = Interval(self.config.log_s), Interval(self.config.save_s)
        for module in self.task.modules.values():
            module.train()
        last_sync: float | None = None
        while p.done(stage) < stage.length and not self._stopping:
            self._step(stage, p.done(stage) / stage.length)
            if p.number % self.sync_every and p.number != stage.steps:
                continue
            now = time.monotonic()
            # the first steps choose and compile kernels: their time is not counted
            self._sync(now - last_sync if last_sync is not None else 0.0)
            last_sync = now
            if log.due(now):
                self._log(stage)
            if save.due(now):
                self.save()
            metrics = {"step": p.steps, **self._means}
            self.report.progress(stage.name, p.done(stage), stage.length, stage.unit, metrics)
        self._log(stage)
        if not self._stopping:
            self._end_stage(stage)
        self.report.end_stage()
        self.save()

    def _sync(self, seconds: float) -> None:
        """Exchange the ranks' status; update the average, or return to it after a failed step."""
        status = self.group.exchange_status(self._failed, self._signalled, seconds)
        self.progress.spent += status.seconds
        self.progress.total += status.seconds
        self._stopping = status.stopping
        if status.finite:
            self._update_average()
        else:
            self._restore_average()

    def _step(self, stage: Stage, fraction: float) -> None:
        """Apply all updates of one training step."""
        p = self.progress
        rate = self.task.learning_rate(p.number, fraction, stage) * 0.5 ** max(0, p.setbacks - 1)
        seeds = [_seed(self.config.seed, p.steps, rank) for rank in (self.group.rank, "all")]
        generator = torch.Generator(self.group.device).manual_seed(seeds[0])
        step = TrainingStep(stage, p.number, fraction, generator, random.Random(seeds[1]))
        for update in self.task.updates(step):
            self._apply(update, rate)
            for name, value in update.metrics.items():
                total, count = self._sums.get(name, (torch.zeros_like(value), 0))
                self._sums[name] = total + value, count + 1
        p.number, p.steps = p.number + 1, p.steps + 1

    def _apply(self, update: Update, rate: float) -> None:
        optimiser = self.optimisers[update.module]
        parameters = list(self.task.modules[update.module].parameters())
        optimiser.zero_grad(set_to_none=True)
        update.loss.backward()  # type: ignore[no-untyped-call]
        self.group.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("relative", 1.0)
        optimiser.step()
        self._failed |= ~(torch.isfinite(update.loss.detach()) & torch.isfinite(norm))

    def _update_average(self) -> None:
        """Move the average towards the current weights, by the steps since the last sync."""
        number = self.progress.number
        steps = number % self.sync_every or self.sync_every
        decay = min(self.config.ema, (1 + number) / (10 + number)) ** steps
        for name, module in self.task.modules.items():
            average, state = self.average[name], module.state_dict()
            floats = [k for k, v in state.items() if v.is_floating_point()]
            torch._foreach_lerp_(
                [average[k] for k in floats], [state[k] for k in floats], 1 - decay
            )

    def _restore_average(self) -> None:
        """Continue from the averaged weights; every time but the first, halve the learning rate."""
        p = self.progress
        p.setbacks += 1
        self.report.row(not_finite=p.steps, setbacks=p.setbacks)
        self._load_average()
        self.optimisers = self._new_optimisers()
        self._sums.clear()
        self._failed.zero_()

    def _end_stage(self, stage: Stage) -> None:
        """Validate and export the averaged weights, then prepare the next stage."""
        self._load_average()
        row = {"stage": stage.name, "step": self.progress.steps, "s": round(self.progress.spent)}
        # held-out pictures have other shapes than crops: do not compile for them
        with torch.compiler.set_stance("force_eager"):
            metrics = self.task.validate(stage)
        self.report.row(**row, **metrics)
        self.report.scalars("held out", metrics, self.progress.steps)
        self._export(stage)
        p = self.progress
        p.stage, p.spent, p.number, p.setbacks = p.stage + 1, 0.0, 0, 0
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Prepare the current stage if the plan has it and it was not prepared before.

        A finished run can be resumed with a longer plan; its new stages are prepared then.
        """
        p = self.progress
        if p.begun < p.stage < len(self.config.plan):
            self.task.begin(p.stage)
            self.average = _copies(self.task.modules)
            self.optimisers = self._new_optimisers()
            p.begun = p.stage

    def _export(self, stage: Stage) -> None:
        """Export the averaged weights; the modules keep the current ones."""
        if self.group.is_first:
            p, device = self.progress, self.group.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            facts = {"steps": p.steps, "minutes": round(p.total / 60, 1), "device": name}
            with self._averaged():
                self.task.export(stage, card(self.config) | facts | {"devices": self.group.world})

    def _log(self, stage: Stage) -> None:
        """Log the means of the metrics since the last row. Reading them waits for the device."""
        sums, self._sums = self._sums, {}
        if not sums:
            return
        self._means = {k: float(f"{float(total) / n:.4g}") for k, (total, n) in sums.items()}
        p = self.progress
        self.report.row(stage=stage.name, step=p.steps, s=round(p.spent), **self._means)
        self.report.scalars(f"stage {stage.name}", self._means, p.steps)

    def save(self) -> None:
        """Write a checkpoint, and export the averaged weights."""
        if not self.group.is_first:
            return
        state: shards.State = {}
        for name, module in self.task.modules.items():
            state[name] = module.state_dict()
            state[f"{name}_average"] = self.average[name]
            state[f"{name}_optimiser"] = _optimiser_tensors(self.optimisers[name])
        facts = {"progress": asdict(self.progress), "config": card(self.config)}
        shards.save(self.out / "checkpoint", state, facts)
        self._export(self.config.plan[min(self.progress.stage, len(self.config.plan) - 1)])

    def _resume(self) -> None:
        state, facts = shards.load(self.out / "checkpoint", self.group.device)
        # checkpoints from before `begun` was saved: `begin` had been called for the current stage
        self.progress = Progress(**{"begun": facts["progress"]["stage"]} | facts["progress"])
        self._check_config(facts["config"])
        try:
            self._load_state(state)
        except (KeyError, RuntimeError) as e:
            raise WeightsError(
                f"{self.out}: the checkpoint belongs to another configuration: {e}"
            ) from e
        self._begin_stage()
        self.group.broadcast(self.task.modules.values())
        p = self.progress
        self.report.row(resumed=p.stage, s=round(p.spent), step=p.steps)

    def _check_config(self, saved: dict[str, object]) -> None:
        """Raise `WeightsError` if optimiser or begun stages differ from the checkpoint's."""
        optimiser = saved.get("optimiser", self.config.optimiser)
        if optimiser != self.config.optimiser:
            raise WeightsError(
                f"{self.out}: --optimiser is {self.config.optimiser}; "
                f"the checkpoint's optimiser is {optimiser}: use that one, or another --out"
            )
        begun = self.progress.stage + (self.progress.number > 0)
        names = [stage["name"] for stage in saved["plan"]][:begun]  # type: ignore[attr-defined]
        if [stage.name for stage in self.config.plan][:begun] != names:
            raise WeightsError(
                f"{self.out}: the checkpoint's plan begins with {', '.join(names)}; "
                "give a --plan that begins with the same stages"
            )

    def _load_state(self, state: shards.State) -> None:
        """Load modules, averages and optimisers; `KeyError` or `RuntimeError` if they differ."""
        for name, module in self.task.modules.items():
            module.load_state_dict(state[name])
        self.average = _copies(self.task.modules)  # copies keep the modules' memory format
        for name, average in self.average.items():
            for key, value in state[f"{name}_average"].items():
                average[key].copy_(value)
        self.optimisers = self._new_optimisers()
        for name, optimiser in self.optimisers.items():
            _load_optimiser(optimiser, state[f"{name}_optimiser"])

    def _new_optimisers(self) -> dict[str, Optimizer]:
        return {name: self.task.optimiser(name) for name in self.task.modules}

    def _load_average(self) -> None:
        for name, module in self.task.modules.items():
            module.load_state_dict(self.average[name])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights into the modules for the duration of the block."""
        current = _copies(self.task.modules)
        self._load_average()
        try:
            yield
        finally:
            for name, module in self.task.modules.items():
                module.load_state_dict(current[name])


def _seed(*values: object) -> int:
    """Return a 63-bit seed that depends on all `values`."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _copies(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {k: v.detach().clone() for k, v in module.state_dict().items()}
        for name, module in modules.items()
    }


def _optimiser_tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state with keys `parameter number/name`."""
    state = optimiser.state_dict()["state"]
    return {f"{i}/{key}": v for i, values in state.items() for key, v in values.items()}


def _load_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `_optimiser_tensors` returned.

    Fused kernels need every moment in the memory format of its parameter.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition("/")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape and value.dim():
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT with `handler` for the duration of the block."""
    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
