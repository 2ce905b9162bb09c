"""What a run of the diffusion decoder can be told."""

from dataclasses import dataclass, replace

from models.diffusion.presets import PRESETS
from models.tiers import MAX_STEPS
from models.train.config import RunConfig, Stage, option

PHASES = (Stage("phase1", 60), Stage("phase2", 45))
"""What is trained where no plan says otherwise; the paper's loss has the first alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig(RunConfig):
    """A run of the diffusion decoder; recorded with the weights it makes."""

    photos: str = option("", "photographs, encoded on the device at start; bsds_val_* are held out")
    bank: str = option("", "instead of --photos: encoded photographs, a folder with q1, q2, …")
    held_out: str = option("", "with --bank: the same of held-out photographs")
    codecs: str = option("", "with --photos: folder of msh_q….safetensors, if not the shipped")
    qualities: tuple[int, ...] = option((1, 2, 3), "with --photos: qualities to encode at")
    variants: int = option(2, "with --photos: ways to show each photograph at each quality")
    plan: tuple[Stage, ...] = option(
        (),
        "phase1:MINUTES,phase2:MINUTES (default: phase1:60,phase2:45; paper: phase1:60)",
        type=Stage.plan,
    )
    preset: str = option("compact", "network and loss", choices=tuple(PRESETS))
    widths: tuple[int, ...] = option((), "channels of the network's levels, if not the preset's")
    other_codec: bool = option(False, "--init's weights belong to another codec: read latents anew")
    lpips: str = option("", "LPIPS weights (AlexNet or VGG), for phase 2 and for the paper's loss")
    calls: int = option(4, "denoiser calls of the perceptual decoder that phase 2 trains")
    lr_phase2: float = option(2e-4, "learning rate of phase 2 at its top")
    times: str = option(
        "uniform", "which the denoiser learns most at", choices=("uniform", "middle")
    )
    drop_latents: float = option(0.12, "part of the crops whose latents are hidden")
    mse_weight: float = option(0.2, "weight of the squared error in phase 2")
    mse_allowance: float = option(1.5, "x the codec's own error, beyond which it weighs 3 x more")
    spectrum: float = option(0.2, "weight of the distance of local power spectra in phase 2")
    adversarial: float = option(0.0, "weight of the adversarial term in phase 2")
    adversarial_after: int = option(
        2000, "steps of phase 2 before it counts; the discriminator learns in half of them"
    )
    rho: float = option(0.9, "weight of LPIPS in the paper's loss")

    @property
    def paper(self) -> bool:
        """Whether the loss is the paper's."""
        return PRESETS[self.preset].prediction == "eps"


def resolved(config: DiffusionConfig) -> DiffusionConfig:
    """With the preset's own plan and rates; `ValueError` where options contradict each other."""
    phases = PHASES[:1] if config.paper else PHASES
    plan = config.plan or phases
    for stage in plan:
        if stage.name not in (names := [phase.name for phase in phases]):
            raise ValueError(f"stage {stage.name!r}: {config.preset} has {', '.join(names)}")
        if stage.name == "phase2" and config.batch < 2:
            raise ValueError("phase 2 needs a batch of 2 or more: half of it is denoised")
    if not 1 <= config.calls <= MAX_STEPS:
        raise ValueError(f"--calls {config.calls}: choose a number from 1 to {MAX_STEPS}")
    if bool(config.photos) == bool(config.bank) or bool(config.bank) != bool(config.held_out):
        raise ValueError("either --photos, or --bank and --held-out")
    if config.crop % 16 or config.crop < 48:
        raise ValueError(f"crops of {config.crop} pixels: not a multiple of 16, or below 48")
    lr, ema = (5e-5, 0.9999) if config.paper else (4e-4, 0.999)
    return replace(config, plan=plan, lr=config.lr or lr, ema=config.ema or ema)
