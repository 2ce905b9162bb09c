"""Training of the codec: rate and distortion of the mean-scale hyperprior (Minnen 2018).

One stage per quality, each starting from the weights of the one before, latents rescaled by the
root of the ratio of their lambdas: a change of lambda is a change of step size first. The last part
of a stage trains the hyperprior alone, which otherwise lags behind the transforms.
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
from models.train import photos
from models.train.config import RunConfig, Stage, option
from models.train.distributed import Ranks
from models.train.hyperprior import Hyperprior
from models.train.run import Play, Step, cosine
from models.train.soap import Soap

LAMBDA = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130}
"""Weight of 255² x MSE against bits per pixel, by quality (CompressAI's)."""
STRIDE_Z = 64
LIVE = 4.0
"""Standard deviation that a random start's latents are scaled to: they begin far below a step."""
SETTLE = 200
"""Steps between two visits of the bottleneck's quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MshConfig(RunConfig):
    """A run of the codec."""

    photos: str = option("", "folder of photographs; bsds_val_* are held out", required=True)
    plan: tuple[Stage, ...] = option(
        (Stage("3", 11), Stage("2", 7), Stage("1", 4)),
        "QUALITY:MINUTES,…, each starting from the one before (default: 3:11,2:7,1:4)",
        type=Stage.plan,
    )
    origin: int = option(0, "quality of --init's weights; 0: that of the first stage")
    N: int = option(128, "hidden channels, where there is no --init")
    M: int = option(192, "latent channels, where there is no --init")
    batch: int = option(16, "crops in a step, on each device")
    crop: int = option(256, "pixels along a crop's side, a multiple of 64")
    lr: float = option(4e-4, "learning rate of the transforms at its top")
    hyper: float = option(3.0, "learning rate of the hyperprior, relative to the transforms'")
    tail: float = option(0.08, "last part of a stage, in which the hyperprior learns alone")
    ema: float = option(0.999, "decay of the averaged weights in a step")
    warm: int = option(300, "steps over which a stage's learning rate rises")
    whole: int = option(24, "held-out photographs that a stage is judged by")
    limit: int = option(0, "train on the first so many photographs; 0: on all")


class MshTask:
    """What `Run` trains; see its `Task`."""

    def __init__(self, config: MshConfig, ranks: Ranks) -> None:
        if config.crop % STRIDE_Z:
            raise ValueError(f"crops of {config.crop} pixels: not a multiple of {STRIDE_Z}")
        self.plan = [_quality(stage) for stage in config.plan]
        self.config, self.device = config, ranks.device
        files, held_out = (photos.photographs(Path(config.photos), held) for held in (False, True))
        self.photos = photos.Photos(files[: config.limit or None], ranks.device)
        self.held_out = held_out[:: max(1, len(held_out) // config.whole)][: config.whole]
        torch.manual_seed(config.seed)
        self.net = _start(config).to(ranks.device).to(memory_format=torch.channels_last)
        self.modules: Mapping[str, nn.Module] = {"net": self.net}
        self.bf16 = ranks.device.type == "cuda" if config.bf16 is None else config.bf16
        self.forward: nn.Module = self.net
        if config.compile:
            self.forward = torch.compile(self.net)  # type: ignore[assignment]

    def begin(self, index: int) -> None:
        """Rescale the latents to the stage's quality."""
        if not index and not self.config.init:
            generator = torch.Generator(self.device).manual_seed(self.config.seed)
            x = self.photos.batch(self.config.batch, self.config.crop, 1, generator)
            with torch.no_grad():
                self.net.rescale(LIVE / float(self.net.g_a(x).std()))
        else:
            before = self.plan[index - 1] if index else self.config.origin or self.plan[0]
            self.net.rescale(math.sqrt(LAMBDA[self.plan[index]] / LAMBDA[before]))
        self.net.project()

    def optimiser(self, player: str) -> torch.optim.Optimizer:
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

    def rate(self, step: int, part: float, stage: Stage) -> float:
        """The tail repeats the end of the decay, from a quarter."""
        tail = self.config.tail
        warm = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warm))
        if part >= 1 - tail:
            return warm * 0.25 * (1 - part) / tail
        return warm * cosine(part / (1 - tail), hold=0.4)

    def plays(self, step: Step) -> Iterator[Play]:
        config = self.config
        prior_only = step.part >= 1 - config.tail
        torch.manual_seed(step.own.initial_seed())  # of the rate's noise
        x = self.photos.batch(config.batch, config.crop, step.shared.uniform(1, 2), step.own)
        forward = self.net if prior_only else self.forward  # the tail is too short to compile for
        bits, x_hat = forward(x, self.bf16, prior_only)
        bpp = bits / (len(x) * config.crop**2)
        figures = {"bpp": bpp.detach()}
        loss = bpp
        if x_hat is not None:
            mse = F.mse_loss(x_hat, x)
            loss = bpp + LAMBDA[_quality(step.stage)] * 255**2 * mse
            figures |= {"mse": mse.detach(), "loss": loss.detach()}
        yield Play("net", loss, figures)
        self.net.project()
        if step.number % SETTLE == 0:
            self.net.entropy_bottleneck.settle()

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Mean bpp and PSNR of whole held-out photographs, padded as they are when coded."""
        self._ship()
        self.net.eval()
        rows = [self._judge(photos.read(path)) for path in self.held_out]
        self.net.train()
        names = ("held_bpp", "held_psnr")
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return {name: round(mean, 4) for name, mean in zip(names, means, strict=True)}

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """`msh_q….safetensors`: float16, of CompressAI's names."""
        self._ship()
        tensors = {k: v.half().cpu().contiguous() for k, v in self.net.state_dict().items()}
        with atomic_write(Path(self.config.out) / f"msh_q{stage.name}.safetensors") as part:
            save_file(tensors, part, {"train": json.dumps(card)})

    def _ship(self) -> None:
        """Quantiles where they belong and float16's values: what is judged is what is shipped."""
        self.net.entropy_bottleneck.settle()
        self.net.load_state_dict({k: v.half().float() for k, v in self.net.state_dict().items()})

    def _judge(self, pixels: Tensor) -> tuple[float, float]:
        height, width = pixels.shape[1:]
        x = pixels[None].to(self.device).float() / 255
        across, down = -width % STRIDE_Z, -height % STRIDE_Z
        left, top = across // 2, down // 2
        padded = F.pad(x, (left, across - left, top, down - top), mode="replicate")
        bits, x_hat = self.net(padded)
        made = x_hat[:, :, top : top + height, left : left + width].clamp(0, 1)
        return float(bits) / (height * width), -10 * math.log10(float(F.mse_loss(made, x)))


def sized(config: MshConfig) -> MshConfig:
    """With the sizes of `init`'s weights."""
    if not config.init:
        return config
    m, n = _read(config.init)["g_a.6.weight"].shape[:2]
    return replace(config, N=n, M=m)


def _start(config: MshConfig) -> Hyperprior:
    """A random start, or the weights of `init`."""
    net = Hyperprior(config.N, config.M)
    if config.init:
        tensors = _read(config.init)
        net.load_state_dict({k: tensors[k].float() for k in net.state_dict()})
    return net


def _read(file: str) -> dict[str, Tensor]:
    """A codec's tensors; `WeightsError` where `file` holds something else."""
    tensors, _ = checkpoint.read(Path(file))
    m, n = tensors["g_a.6.weight"].shape[:2] if "g_a.6.weight" in tensors else (1, 1)
    for name, value in Hyperprior(n, m).state_dict().items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise WeightsError(f"{file}: no mean-scale hyperprior: {name} is missing or misshapen")
    return tensors


def _quality(stage: Stage) -> int:
    if not (stage.name.isdigit() and int(stage.name) in LAMBDA):
        raise ValueError(f"stage {stage.name!r}: a quality of {', '.join(map(str, LAMBDA))}")
    return int(stage.name)
