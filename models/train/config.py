"""Run configurations: dataclasses whose fields define the command-line options."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, help: str, **settings: Any) -> T:
    """Return a dataclass field with a help text; `settings` are passed to `add_argument`."""
    field: T = dataclasses.field(default=default, metadata={"help": help, **settings})
    return field


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run. It lasts `steps` training steps, or `minutes` if `steps` is None."""

    name: str
    minutes: float = 0.0
    steps: int | None = None

    @property
    def length(self) -> float:
        """Length of the stage in `unit`."""
        return self.minutes * 60 if self.steps is None else self.steps

    @property
    def unit(self) -> str:
        """Unit in which progress through the stage is measured: `s` or `steps`."""
        return "s" if self.steps is None else "steps"

    @classmethod
    def parse_plan(cls, text: str) -> "tuple[Stage, ...]":
        """Parse `phase1:30,phase2:200steps`: a name and minutes or steps for each stage.

        Raises `argparse.ArgumentTypeError` if a stage has another form.
        """
        return tuple(cls._parse(part) for part in text.split(","))

    @classmethod
    def _parse(cls, text: str) -> "Stage":
        name, _, length = text.partition(":")
        try:
            if length.endswith("steps"):
                stage = cls(name, steps=int(length.removesuffix("steps")))
            else:
                stage = cls(name, float(length))
            if stage.length <= 0:
                raise ValueError(f"{stage.length} is not above 0")
            return stage
        except ValueError as e:
            raise argparse.ArgumentTypeError(
                f"{text!r}: write NAME:MINUTES or NAME:Nsteps, such as phase1:30 or phase1:200steps"
            ) from e


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Options that all trainers share; each trainer adds its own."""

    out: str = option(
        "", "folder for checkpoints, log and weights; use the same one to resume", required=True
    )
    plan: tuple[Stage, ...] = option(
        (),
        "stages: NAME:MINUTES or NAME:Nsteps, separated by commas",
        type=Stage.parse_plan,
        metavar="NAME:LENGTH,…",
    )
    init: str = option("", "safetensors file with the weights to start from")
    optimiser: str = option(
        "adam",
        "soap learns faster than adam if --init gives trained weights",
        choices=("adam", "soap"),
    )
    lr: float = option(0.0, "peak learning rate; 0: the preset's value")
    batch: int = option(8, "crops per step on each device")
    crop: int = option(128, "side length of a crop in pixels")
    warm: int = option(200, "steps of learning-rate warm-up at the start of each stage")
    clip: float = option(1.0, "largest norm of the gradient; larger ones are scaled down to it")
    ema: float = option(0.0, "decay per step of the averaged weights; 0: the preset's value")
    seed: int = option(0, "seed of all random draws, together with rank and step number")
    device: str = option("auto", "device to train on", choices=("auto", "cpu", "cuda"))
    bf16: bool | None = option(None, "bfloat16 in the wide layers (default: on CUDA only)")
    compile: bool = option(False, "compile the networks with torch.compile")
    save_s: float = option(120.0, "seconds between checkpoints")
    log_s: float = option(30.0, "seconds between rows of the log")


PATHS = frozenset(
    {"out", "init", "narrow", "teacher", "photos", "bank", "held_out", "others", "lpips", "codecs"}
)
"""Fields that hold paths; `card` records only the last component of each."""


def card(config: RunConfig) -> dict[str, Any]:
    """Return `config` as JSON values for a weights file's metadata, without local folder names."""
    fields = dataclasses.asdict(config)
    del fields["out"]
    return {k: Path(v).name if k in PATHS and v else v for k, v in fields.items()}


def add_options(parser: argparse.ArgumentParser, config: type[RunConfig]) -> None:
    """Add one option per field of `config`. Omitted options keep the field's default."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        settings = {
            "default": argparse.SUPPRESS, **_settings_of(hints[field.name]), **field.metadata
        }  # fmt: skip
        if "default" not in settings["help"] and field.default not in ("", (), None):
            settings["help"] += f" (default: {field.default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def _settings_of(hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field of this type."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": _numbers, "metavar": "N,N,…"}
    return {"type": hint}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
