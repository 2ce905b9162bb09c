"""Training of the codec, a mean-scale hyperprior ("msh", Minnen 2018), for rate and distortion.

The plan has one stage per quality, and each stage starts from the weights of the previous one. At
the start of a stage the latents are multiplied by the square root of the ratio of the new lambda to
the old one, because lambda mainly determines the quantiser's step relative to the latents. The tail
(last part) of each stage trains only the hyperprior, which otherwise lags behind the transforms.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models import checkpoint
from models.errors import WeightsError
from models.files import atomic_write
from models.geometry import STRIDE_Z
from models.train import photos
from models.train.config import RunConfig, Stage, option
from models.train.distributed import ProcessGroup
from models.train.hyperprior import TrainableHyperprior
from models.train.soap import Soap
from models.train.task import TrainingStep, Update, cosine

LAMBDA = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130}
"""Weight of 255² x MSE relative to bits per pixel, by quality (CompressAI's values)."""
LATENTS_STD = 4.0
"""Standard deviation to which latents of random weights are scaled; else all round to zero."""
QUANTILES_EVERY = 200
"""Steps between two updates of the entropy bottleneck's quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MshConfig(RunConfig):
    """Options of a codec run."""

    photos: str = option("", "folder of photographs; bsds_val_* are held out", required=True)
    plan: tuple[Stage, ...] = option(
        (Stage("3", 11), Stage("2", 7), Stage("1", 4)),
        "stages QUALITY:MINUTES or QUALITY:Nsteps, separated by commas; each starts from the "
        "previous one's weights (default: 3:11,2:7,1:4)",
        type=Stage.parse_plan,
        metavar="NAME:LENGTH,…",
    )
    origin: int = option(
        0, "quality that the weights of --init were trained for; 0: that of the first stage"
    )
    N: int = option(128, "hidden channels, if there is no --init")
    M: int = option(192, "latent channels, if there is no --init")
    batch: int = option(16, "crops per step on each device")
    crop: int = option(256, "side length of a crop in pixels, a multiple of 64")
    lr: float = option(4e-4, "peak learning rate of the transforms")
    hyper: float = option(3.0, "learning rate of the hyperprior, as a multiple of the transforms'")
    tail: float = option(0.08, "fraction of a stage, at its end, that trains only the hyperprior")
    ema: float = option(0.999, "decay per step of the averaged weights")
    warm: int = option(300, "steps of learning-rate warm-up at the start of each stage")
    whole: int = option(24, "number of held-out photographs for validation")
    limit: int = option(0, "train on the first N photographs only; 0: on all")


class MshTask:
    """The `Task` that trains the codec."""

    def __init__(self, config: MshConfig, group: ProcessGroup) -> None:
        """`config` is the result of `with_init_sizes`. Raises `ValueError` for wrong options."""
        if config.crop % STRIDE_Z:
            raise ValueError(f"--crop {config.crop}: choose a multiple of {STRIDE_Z}")
        self.plan = [_quality(stage) for stage in config.plan]
        self.config, self.device = config, group.device
        files, held_out = (photos.photographs(Path(config.photos), held) for held in (False, True))
        self.photos = photos.Photos(files[: config.limit or None], group.device)
        self.held_out = held_out[:: max(1, len(held_out) // config.whole)][: config.whole]
        torch.manual_seed(config.seed)
        self.net = _initial_net(config).to(group.device).to(memory_format=torch.channels_last)
        self.modules: Mapping[str, nn.Module] = {"net": self.net}
        self.bf16 = group.device.type == "cuda" if config.bf16 is None else config.bf16
        self.forward: nn.Module = self.net
        if config.compile:
            self.forward = torch.compile(self.net)  # type: ignore[assignment]

    def begin(self, index: int) -> None:
        """Rescale the latents for the stage's quality."""
        if not index and not self.config.init:
            generator = torch.Generator(self.device).manual_seed(self.config.seed)
            x = self.photos.batch(self.config.batch, self.config.crop, 1, generator)
            with torch.no_grad():
                self.net.rescale(LATENTS_STD / float(self.net.g_a(x).std()))
        else:
            previous = self.plan[index - 1] if index else self.config.origin or self.plan[0]
            self.net.rescale(math.sqrt(LAMBDA[self.plan[index]] / LAMBDA[previous]))
        self.net.project()

    def optimiser(self, module: str) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in self.net.named_parameters() if p.requires_grad]
        transforms = [p for n, p in named if n.startswith("g_")]
        prior = [p for n, p in named if not n.startswith("g_")]
        groups: list[dict[str, Any]] = [
            {"params": transforms},
            {"params": prior, "relative": self.config.hyper},
        ]
        if self.config.optimiser == "soap":
            return Soap(groups, self.config.lr)
        return torch.optim.Adam(groups, self.config.lr, fused=True)

    def learning_rate(self, step: int, fraction: float, stage: Stage) -> float:
        """Return the rate: warm-up, a cosine, then in the tail linear from peak / 4 to zero."""
        tail = self.config.tail
        warm = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warm))
        if fraction >= 1 - tail:
            return warm * 0.25 * (1 - fraction) / tail
        return warm * cosine(fraction / (1 - tail), hold=0.4)

    def updates(self, step: TrainingStep) -> Iterator[Update]:
        config = self.config
        prior_only = step.fraction >= 1 - config.tail
        torch.manual_seed(step.generator.initial_seed())  # for the noise that replaces rounding
        reach = step.shared_random.uniform(1, 2)
        x = self.photos.batch(config.batch, config.crop, reach, step.generator)
        # the tail is too short for a compilation to pay off
        forward = self.net if prior_only else self.forward
        bits, x_hat = forward(x, self.bf16, prior_only)
        bpp = bits / (len(x) * config.crop**2)
        metrics = {"bpp": bpp.detach()}
        loss = bpp
        if x_hat is not None:
            mse = F.mse_loss(x_hat, x)
            loss = bpp + LAMBDA[_quality(step.stage)] * 255**2 * mse
            metrics |= {"mse": mse.detach(), "loss": loss.detach()}
        yield Update("net", loss, metrics)
        self.net.project()
        if step.number % QUANTILES_EVERY == 0:
            self.net.entropy_bottleneck.update_quantiles()

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Return mean bpp and PSNR of whole held-out photographs, padded as the coder pads them."""
        self._round_to_half()
        self.net.eval()
        rows = [self._measure(photos.read(path)) for path in self.held_out]
        self.net.train()
        names = ("held_bpp", "held_psnr")
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return {name: round(mean, 4) for name, mean in zip(names, means, strict=True)}

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """Write `msh_q….safetensors`: float16, with CompressAI's tensor names."""
        self._round_to_half()
        tensors = {k: v.half().cpu().contiguous() for k, v in self.net.state_dict().items()}
        with atomic_write(Path(self.config.out) / f"msh_q{stage.name}.safetensors") as part:
            save_file(tensors, part, {"train": json.dumps(card)})

    def _round_to_half(self) -> None:
        """Update the quantiles and round the weights to float16, as they are exported."""
        self.net.entropy_bottleneck.update_quantiles()
        self.net.load_state_dict({k: v.half().float() for k, v in self.net.state_dict().items()})

    def _measure(self, pixels: Tensor) -> tuple[float, float]:
        """Return bpp and PSNR of a photograph (3, H, W) uint8."""
        height, width = pixels.shape[1:]
        x = pixels[None].to(self.device).float() / 255
        across, down = -width % STRIDE_Z, -height % STRIDE_Z
        left, top = across // 2, down // 2
        padded = F.pad(x, (left, across - left, top, down - top), mode="replicate")
        bits, x_hat = self.net(padded)
        picture = x_hat[:, :, top : top + height, left : left + width].clamp(0, 1)
        return float(bits) / (height * width), -10 * math.log10(float(F.mse_loss(picture, x)))


def with_init_sizes(config: MshConfig) -> MshConfig:
    """Return `config` with N and M of the weights in `init`, if there are any."""
    if not config.init:
        return config
    m, n = _read(config.init)["g_a.6.weight"].shape[:2]
    return replace(config, N=n, M=m)


def _initial_net(config: MshConfig) -> TrainableHyperprior:
    """Return a network with random weights or those of `init`."""
    net = TrainableHyperprior(config.N, config.M)
    if config.init:
        tensors = _read(config.init)
        net.load_state_dict({k: tensors[k].float() for k in net.state_dict()})
    return net


def _read(file: str) -> dict[str, Tensor]:
    """Read a codec's tensors. Raises `WeightsError` if one is missing or has another shape."""
    tensors, _ = checkpoint.read(Path(file))
    m, n = tensors["g_a.6.weight"].shape[:2] if "g_a.6.weight" in tensors else (1, 1)
    for name, value in TrainableHyperprior(n, m).state_dict().items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise WeightsError(
                f"{file}: not a mean-scale hyperprior: {name} is missing or has another shape"
            )
    return tensors


def _quality(stage: Stage) -> int:
    """Return the quality that a stage is named after. Raises `ValueError` for other names."""
    if not (stage.name.isdigit() and int(stage.name) in LAMBDA):
        qualities = ", ".join(map(str, LAMBDA))
        raise ValueError(f"stage {stage.name!r}: name it after a quality, one of {qualities}")
    return int(stage.name)
