"""The interface between `run.Run`, which drives training, and the model that it trains.

`MshTask` and `DiffusionTask` implement `Task`.
"""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.train.config import Stage


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One training step and its random generators.

    The generators are seeded from the run's seed and the step's number, so a resumed run draws the
    same numbers without any saved generator state.
    """

    stage: Stage
    number: int  # number of the step within the stage, from 0
    fraction: float  # completed fraction of the stage, in [0, 1)
    generator: torch.Generator  # on the device; each rank draws other numbers
    shared_random: random.Random  # all ranks draw the same: for choices of which losses to compute


class Update(NamedTuple):
    """One optimiser update: a step down the gradient of `loss` for the parameters of `module`."""

    module: str  # key of `Task.modules`
    loss: Tensor
    metrics: dict[str, Tensor]  # for the log: 0-dim, detached


class Task(Protocol):
    """A model in training: its modules, losses, validation and export."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules on the device by name. After a stage their averaged weights replace them."""

    def begin(self, index: int) -> None:
        """Prepare `modules` for stage `index` of the plan. Not called when a run resumes in it."""

    def optimiser(self, module: str) -> Optimizer:
        """Return a new optimiser for a module.

        A parameter group may have the key `relative`, a factor to the learning rate.
        """

    def learning_rate(self, step: int, fraction: float, stage: Stage) -> float:
        """Return the learning rate for `step`, when `fraction` of the stage is complete."""

    def updates(self, step: TrainingStep) -> Iterator[Update]:
        """Yield the optimiser updates of one step. Each is applied before the next is computed."""

    def validate(self, stage: Stage) -> dict[str, float]:
        """Return metrics of `modules` on held-out photographs."""

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """Write `modules` as a weights file into the run's folder, atomically."""


def cosine(fraction: float, hold: float = 0.0, floor: float = 0.02) -> float:
    """Return the learning-rate factor: 1 until `hold`, then half a cosine down to `floor` at 1."""
    decayed = min(max(fraction - hold, 0.0) / (1 - hold), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decayed))
