"""Options of a training run of the diffusion decoder."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from models.diffusion.presets import PRESETS
from models.tiers import MAX_STEPS
from models.train.config import RunConfig, Stage, option

PHASES = (Stage("phase1", 60), Stage("phase2", 45))
"""Default plan. The preset `paper` trains in phase 1 only."""
PERCEPTUAL = "perceptual"
"""Stage that trains the perceptual decoder alone: for a network that serves no posterior tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig(RunConfig):
    """Options of a decoder run; they are recorded in the metadata of the weights."""

    photos: str = option(
        "", "folder of photographs, encoded on the device at start; bsds_val_* are held out"
    )
    bank: str = option("", "instead of --photos: folder of encoded photographs in q1, q2, …")
    held_out: str = option("", "with --bank: folder of encoded held-out photographs")
    others: str = option(
        "", "with --bank: folder of photographs that other codecs encoded; their latents are hidden"
    )
    others_share: float = option(0.25, "fraction of the steps that train on --others")
    codecs: str = option("", "with --photos: folder of msh_q….safetensors (default: shipped ones)")
    qualities: tuple[int, ...] = option((1, 2, 3), "with --photos: qualities to encode at")
    variants: int = option(
        2,
        "with --photos: versions of each photograph per quality; the first is unchanged, "
        "others are scaled, flipped or transposed",
    )
    plan: tuple[Stage, ...] = option(
        (),
        "stages phase1, phase2 and perceptual, each with minutes or steps, such as "
        "phase1:30,phase2:200steps (default: phase1:60,phase2:45; paper: phase1 only, 60)",
        type=Stage.parse_plan,
        metavar="NAME:LENGTH,…",
    )
    preset: str = option("compact", "network and loss", choices=tuple(PRESETS))
    widths: tuple[int, ...] = option((), "channels per level, instead of the preset's")
    other_codec: bool = option(
        False,
        "--init is for another codec: start the layers that read latents from random weights",
    )
    narrow: str = option(
        "", "decoder.safetensors whose most used channels are the start of a smaller preset"
    )
    lpips: str = option(
        "", "LPIPS weights (AlexNet or VGG), for the few-step decoder and the paper's loss"
    )
    calls: int = option(
        4, "denoiser calls per picture of the few-step decoder that phase2 and perceptual train"
    )
    lr_phase2: float = option(2e-4, "peak learning rate of phase 2 and of stage perceptual")
    times: str = option(
        "uniform",
        "distribution of diffusion times; middle favours t from .1 to .7",
        choices=("uniform", "middle"),
    )
    drop_latents: float = option(0.12, "fraction of crops whose latents are hidden")
    mse_weight: float = option(0.2, "weight of the squared error of the few-step decoder")
    mse_allowance: float = option(
        1.5, "if the squared error is more than this multiple of the codec's, triple its weight"
    )
    teacher: str = option(
        "",
        "decoder.safetensors that draws in one call; with --calls 1, the decoder learns to draw "
        "its pictures from the same noise",
    )
    teacher_weight: float = option(
        0.2, "weight of the squared error to the teacher's picture, relative to the codec's error"
    )
    spectrum: float = option(0.2, "weight of the distance of local power spectra")
    sparsity: float = option(0.0, "weight of the distance of local sparsity")
    chroma_spectrum: float = option(
        0.0, "weight of the distance of local power spectra of the colour differences"
    )
    period: float = option(0.0, "weight of the share of the error that repeats every 16 pixels")
    scene_statistics: float = option(
        0.0, "weight of the distance of natural scene statistics (those of NIQE)"
    )
    adversarial: float = option(0.0, "weight of the adversarial term")
    adversarial_after: int = option(
        2000,
        "steps of a stage before the adversarial term is used; the discriminator is trained in "
        "those whose last denoiser call is late: half of them with --calls 4, all with --calls 1",
    )
    rho: float = option(0.9, "weight of LPIPS in the paper's loss")

    @property
    def paper(self) -> bool:
        """True if the preset trains with the paper's loss."""
        return PRESETS[self.preset].prediction == "eps"


def resolve(config: DiffusionConfig) -> DiffusionConfig:
    """Return `config` with the preset's plan, learning rate and EMA decay filled in.

    Raises `ValueError` if options are out of range or contradict each other.
    """
    config = replace(config, plan=config.plan or _phases(config))
    for wrong, message in chain(_stages(config), _weights(config), _photographs(config)):
        if wrong:
            raise ValueError(message)
    lr, ema = (5e-5, 0.9999) if config.paper else (4e-4, 0.999)
    return replace(config, lr=config.lr or lr, ema=config.ema or ema)


def _phases(config: DiffusionConfig) -> tuple[Stage, ...]:
    return PHASES[:1] if config.paper else PHASES


Checks = Iterator[tuple[bool, str]]
"""(True if an option is wrong, error message) for every rule."""


def _stages(config: DiffusionConfig) -> Checks:
    """Rules of the plan, and of the options that belong to some of its stages."""
    phases = [phase.name for phase in _phases(config)]
    if not config.paper:
        phases.append(PERCEPTUAL)
    for stage in config.plan:
        yield (
            stage.name not in phases,
            f"stage {stage.name!r}: {config.preset} has {', '.join(phases)} only",
        )
        yield (
            stage.name == "phase2" and config.batch < 2,
            f"--batch {config.batch}: phase 2 splits each batch and needs a batch of 2 or more",
        )
    yield config.batch < 1, f"--batch {config.batch}: choose 1 or more"
    trains_perceptual = any(stage.name != "phase1" for stage in config.plan)
    for name in ("teacher", "adversarial"):
        yield (
            bool(getattr(config, name)) and not trains_perceptual,
            f"--{name}: needs the stage phase2 or perceptual in --plan",
        )
    yield (
        not 1 <= config.calls <= MAX_STEPS,
        f"--calls {config.calls}: choose a number from 1 to {MAX_STEPS}",
    )


def _weights(config: DiffusionConfig) -> Checks:
    """Rules of the weights to start or learn from."""
    yield (
        bool(config.init and config.narrow),
        "--init and --narrow both name weights to start from; give one of them",
    )
    yield config.other_codec and not config.init, "--other-codec: needs --init"
    yield (
        bool(config.teacher) and config.calls != 1,
        f"--calls {config.calls}: with --teacher, choose 1, because a teacher draws in one call",
    )


def _photographs(config: DiffusionConfig) -> Checks:
    """Rules of the photographs and of the crops of them."""
    yield (
        bool(config.photos) == bool(config.bank) or bool(config.bank) != bool(config.held_out),
        "give either --photos, or --bank and --held-out",
    )
    for name in ("codecs", "qualities", "variants"):
        yield (
            bool(config.bank) and getattr(config, name) != getattr(DiffusionConfig(), name),
            f"--{name}: needs --photos; the photographs of --bank are encoded already",
        )
    for quality in config.qualities:
        yield not 1 <= quality <= 8, f"--qualities {quality}: choose numbers from 1 to 8"
    yield (
        bool(config.others) and (config.paper or not config.bank),
        "--others needs --bank, and a preset that can do without latents: compact, small or fine",
    )
    for name in ("others_share", "drop_latents"):
        yield (
            not 0 <= (share := getattr(config, name)) <= 1,
            f"--{name.replace('_', '-')} {share}: choose a number from 0 to 1",
        )
    yield (
        config.crop % 16 != 0 or config.crop < 48,
        f"--crop {config.crop}: choose a multiple of 16 that is not below 48",
    )
