"""Configurations: dataclasses whose fields carry their help, which the command line follows."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, help: str, **more: Any) -> T:
    """A dataclass field with its help text; `more` goes to `add_argument`."""
    field: T = dataclasses.field(default=default, metadata={"help": help, **more})
    return field


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run: what is trained, and how long."""

    name: str
    minutes: float

    @classmethod
    def plan(cls, text: str) -> "tuple[Stage, ...]":
        """`name:minutes,name:minutes`; an error for the command line for anything else."""
        stages = []
        for part in text.split(","):
            name, _, minutes = part.partition(":")
            try:
                stages.append(cls(name, float(minutes)))
            except ValueError as e:
                raise argparse.ArgumentTypeError(f"{part!r} is not NAME:MINUTES") from e
        return tuple(stages)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What every trainer's run needs; each trainer adds its own."""

    out: str = option("", "folder of checkpoints, log and weights; repeat to resume", required=True)
    plan: tuple[Stage, ...] = option((), "stages and minutes, NAME:MINUTES,…", type=Stage.plan)
    init: str = option("", "safetensors file with the weights to start from")
    optimiser: str = option(
        "adam",
        "soap goes farther in the same time, from weights that are trained already",
        choices=("adam", "soap"),
    )
    lr: float = option(0.0, "learning rate at its top; 0: the preset's own")
    batch: int = option(8, "crops in a step, on each device")
    crop: int = option(128, "pixels along a crop's side")
    warm: int = option(200, "steps over which a stage's learning rate rises")
    clip: float = option(1.0, "largest norm of a gradient")
    ema: float = option(0.0, "decay of the averaged weights in a step; 0: the preset's own")
    seed: int = option(0, "every draw depends on it, the rank and the step alone")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    bf16: bool | None = option(None, "bfloat16 in the wide layers (default: on CUDA only)")
    compile: bool = option(False, "torch.compile the networks")
    save_s: float = option(120.0, "seconds between checkpoints")
    log_s: float = option(30.0, "seconds between lines of the log")


PATHS = frozenset({"out", "init", "photos", "bank", "held_out", "lpips", "codecs"})
"""Fields that name files: a card tells their last part only."""


def card(config: RunConfig) -> dict[str, Any]:
    """`config` as it is recorded with weights: JSON, without anyone's folders."""
    fields = dataclasses.asdict(config)
    del fields["out"]
    return {k: Path(v).name if k in PATHS and v else v for k, v in fields.items()}


def add_options(parser: argparse.ArgumentParser, config: type[RunConfig]) -> None:
    """One option per field of `config`; what is not given keeps the field's default."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        settings = {"default": argparse.SUPPRESS, **_reads(hints[field.name]), **field.metadata}
        if "default" not in settings["help"] and field.default not in ("", (), None):
            settings["help"] += f" (default: {field.default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def _reads(hint: Any) -> dict[str, Any]:
    """How `add_argument` reads a value of this type."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": _numbers, "metavar": "N,N,…"}
    return {"type": hint}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
