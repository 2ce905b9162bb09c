"""Training of the diffusion decoder on photographs that the codec has encoded.

Presets `compact` and `fine` train in two phases. Phase 1 (beta 0) trains a denoiser with a v-loss.
Phase 2 trains half of each batch the same way, and the other half (beta 1) as a few-step perceptual
decoder on the model's own trajectories. Stage `perceptual` trains that decoder alone. Preset
`paper` has one phase with the paper's loss.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models import checkpoint
from models.diffusion import schedule
from models.diffusion.presets import UNetConfig
from models.diffusion.unet import UNet, read_network
from models.errors import WeightsError
from models.files import atomic_write
from models.geometry import STRIDE_Y
from models.train import losses, network, photos
from models.train.bank import Bank, Batch
from models.train.config import Stage
from models.train.decoder_config import DiffusionConfig
from models.train.distributed import ProcessGroup
from models.train.losses import Denoise, Hybrid
from models.train.lpips import LpipsLoss
from models.train.narrow import narrow
from models.train.perceptual import TEXTURE, PerceptualLoss
from models.train.soap import Soap
from models.train.task import TrainingStep, Update, cosine
from models.train.teacher import Teacher

PERCEPTUAL_UNTIL = 0.5
"""The perceptual loss is applied to pictures that are predicted at this t or below, or by the last
call. Predictions at higher t are still blurred, because much of the detail is undecided."""
NARROWING_CROPS = 16
"""Number of crops on which the use of channels is measured before a network is narrowed."""
VALIDATION_CROPS = 64
"""Number of held-out crops on which a stage is validated."""


class DiffusionTask:
    """The `Task` that trains the diffusion decoder."""

    def __init__(self, config: DiffusionConfig, group: ProcessGroup) -> None:
        """`config` is the result of `decoder_config.resolve`.

        Raises `WeightsError` if a file does not fit, and `ValueError` if no photograph is as large
        as a crop.
        """
        self.config, self.device = config, group.device
        # first what takes little time: its errors are reported before photographs are encoded
        configuration = network.configuration(config.preset, config.widths)
        self.lpips = LpipsLoss(Path(config.lpips), self.device) if config.lpips else None
        init = checkpoint.read(Path(config.init))[0] if config.init else None
        wide = _read_network(Path(config.narrow)) if config.narrow else None
        teacher = _read_network(Path(config.teacher)) if config.teacher else None
        self.bank, self.held_out, self.others = _banks(config, self.device)
        torch.manual_seed(config.seed)
        configuration = replace(configuration, latents=self.bank.latents)
        self.net = _initial_net(config, configuration, self.bank, init, wide)
        if self.others:
            network.add_qualities(self.net, self.others)
        bf16 = self.device.type == "cuda" if config.bf16 is None else config.bf16
        self.network = network.Network(self.net, self.device, bf16, config.compile)
        self.teacher: Teacher | None = None
        if teacher:
            self.teacher = Teacher(teacher, self.bank.latents, self.device, bf16)
        self.perceptual = PerceptualLoss(config, self.lpips, self.bank.latents, self.device)
        self.modules: dict[str, nn.Module] = {"net": self.net}
        if self.perceptual.discriminator:
            self.modules["discriminator"] = self.perceptual.discriminator
        self.hybrid = Hybrid(self.device)
        self.steps = schedule.Continuous().steps(config.calls)

    def begin(self, index: int) -> None:
        """Do nothing: a stage starts from the weights of the previous one."""

    def optimiser(self, module: str) -> torch.optim.Optimizer:
        paper = self.config.paper
        betas, decay = ((0.9, 0.999), 0.0) if paper else ((0.9, 0.99), 0.01)
        parameters = self.modules[module].parameters()
        if module == "net" and self.config.optimiser == "soap":
            return Soap(parameters, self.config.lr)
        return torch.optim.AdamW(parameters, self.config.lr, betas, weight_decay=decay, fused=True)

    def learning_rate(self, step: int, fraction: float, stage: Stage) -> float:
        """Return the rate: warm-up, then a cosine (for `paper` after 80 % of the stage)."""
        peak = self.config.lr if stage.name == "phase1" else self.config.lr_phase2
        hold = 0.8 if self.config.paper else 0.0
        return peak * min(1.0, (step + 1) / max(1, self.config.warm)) * cosine(fraction, hold)

    def updates(self, step: TrainingStep) -> Iterator[Update]:
        batch, keep = self._batch(step)
        if self.config.paper:
            yield self._paper(batch, step)
        elif step.stage.name == "phase1":
            t = self._times(len(batch.x), step.generator)
            loss, _ = self._denoising(batch, keep, t, step.generator)
            yield Update("net", loss, {"loss": loss.detach(), "v": loss.detach()})
        elif step.stage.name == "phase2":
            yield from self._phase2(batch, keep, step)
        else:
            yield from self._perceptual(batch, keep, step)

    def _batch(self, step: TrainingStep) -> tuple[Batch, Tensor]:
        """Draw a batch; also return 0 for each crop whose latents are hidden, else 1.

        In a random `others_share` of the steps, equal on all ranks, the crops are of other codecs.
        """
        n, crop = self.config.batch, self.config.crop
        if self.others and step.shared_random.random() < self.config.others_share:
            batch = self.others.batch(n, crop, step.generator)
            return batch, torch.zeros(n, device=self.device)
        batch = self.bank.batch(n, crop, step.generator)
        uniform = torch.rand(n, generator=step.generator, device=self.device)
        return batch, (uniform >= self.config.drop_latents).float()

    def _times(self, n: int, generator: torch.Generator) -> Tensor:
        t = losses.stratified(n, generator)
        return losses.middle(t) if self.config.times == "middle" else t

    def _denoising(
        self, batch: Batch, keep: Tensor | None, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the v-loss of the denoiser, and the v-loss of predicting zero."""
        x0 = self.network.residual(batch)
        denoise = self.network.denoiser_for(batch, 0.0, keep)
        return losses.denoising(denoise, x0, t, _noise(x0, generator))

    def _phase2(self, batch: Batch, keep: Tensor, step: TrainingStep) -> Iterator[Update]:
        """Train half of the batch as in phase 1, and half as the few-step decoder."""
        half = len(batch.x) // 2
        t = self._times(half, step.generator)
        v_loss, _ = self._denoising(batch.rows(slice(half)), keep[:half], t, step.generator)
        yield from self._perceptual(batch.rows(slice(half, None)), keep[half:], step, v_loss)

    def _perceptual(
        self, batch: Batch, keep: Tensor, step: TrainingStep, v_loss: Tensor | None = None
    ) -> Iterator[Update]:
        """Train the few-step decoder on a batch; `v_loss` is added to its loss."""
        target = self.network.residual(batch)
        denoise = self.network.denoiser_for(batch, 1.0, keep)
        noise = _noise(target, step.generator)
        call_t, x0 = self._few_steps(denoise, noise, step)
        loss, ratio = self._squared_error(x0, target)
        metrics = {"ratio": ratio}
        if v_loss is not None:
            loss = loss + v_loss
            metrics["v"] = v_loss.detach()
        picture = self.network.picture(batch, x0)
        if self.teacher:
            distance = self.teacher.distance(picture, batch, noise, keep)
            loss = loss + self.config.teacher_weight * distance
            metrics["teacher"] = distance.detach()
        perceptual = call_t <= max(PERCEPTUAL_UNTIL, self.steps[-1].t)
        if perceptual:
            for name, weight, term in self.perceptual.terms(picture, batch, step):
                loss = loss + weight * term
                metrics[name] = term.detach()
        yield Update("net", loss, metrics | {"loss": loss.detach()})
        if perceptual:
            yield from self.perceptual.discriminator_updates(picture.detach(), batch, step)

    def _few_steps(
        self, denoise: Denoise, noise: Tensor, step: TrainingStep
    ) -> tuple[float, Tensor]:
        """Run the sampler up to a random denoiser call; return its time and the x0 it predicts.

        The earlier calls are made without gradient. All ranks choose the same call, so that all
        have the same losses.
        """
        calls = step.shared_random.randrange(len(self.steps))
        with torch.no_grad():
            x_t = losses.rollout(denoise, noise, self.steps[:calls])
        last = self.steps[calls]
        v = denoise(x_t, torch.full((len(x_t),), last.t, device=self.device))
        return last.t, schedule.x0_from_v(x_t, v, last.a)

    def _squared_error(self, x0: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted squared error, and its unweighted ratio to the codec's (x0 = 0)."""
        mse = (x0 - target).square().mean()
        ratio = (mse / target.square().mean()).detach()
        weight = torch.where(ratio > self.config.mse_allowance, 3.0, 1.0)
        return self.config.mse_weight * weight * mse, ratio

    def _paper(self, batch: Batch, step: TrainingStep) -> Update:
        """Return the update with the paper's loss, L_simple + L_vlb / 1000 + rho LPIPS.

        The paper trains on latents with uniform noise, y + U(±1/2). Here they are rounded, so that
        training and inference see the same inputs.
        """
        terms = self._hybrid_terms(batch, step.generator)
        loss = terms.simple + terms.vlb / 1000
        metrics = {"simple": terms.simple.detach(), "vlb": terms.vlb.detach()}
        if self.lpips is not None:
            distance = self.lpips((terms.x0 + 1) / 2, batch.x).mean()
            loss = loss + self.config.rho * distance
            metrics["lpips"] = distance.detach()
        return Update("net", loss, metrics | {"loss": loss.detach()})

    def _hybrid_terms(self, batch: Batch, generator: torch.Generator) -> losses.PaperTerms:
        index = (losses.stratified(len(batch.x), generator) * (self.hybrid.last + 1)).long()
        x = batch.x * 2 - 1
        denoise = self.network.denoiser_for(batch, 0.0)
        return self.hybrid(denoise, x, index, _noise(x, generator))

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Return losses and distances on fixed held-out crops."""
        generator = torch.Generator(self.device).manual_seed(1)
        rows: list[dict[str, Tensor]] = []
        for _ in range(VALIDATION_CROPS // 8):
            batch = self.held_out.batch(8, self.config.crop, generator)
            measure = self._measure_paper if self.config.paper else self._measure
            rows.append(measure(batch, generator))
        return {k: round(float(sum(r[k] for r in rows)) / len(rows), 5) for k in rows[0]}

    def _measure(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return v-losses (of the denoiser, of predicting zero) and the few-step distances."""
        t = losses.stratified(len(batch.x), generator)
        v, zero = self._denoising(batch, None, t, generator)
        denoise = self.network.denoiser_for(batch, 1.0)
        x0 = losses.rollout(denoise, _noise(batch.x, generator), self.steps)
        picture = self.network.picture(batch, x0).clamp(0, 1)
        return {"held_v": v, "held_v_zero": zero} | self._distances(picture, batch)

    def _measure_paper(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the paper's losses (`held_simple` is 1 for predicting zero) and distances.

        The distances are those of the picture predicted by one call at a random time.
        """
        terms = self._hybrid_terms(batch, generator)
        row = {"held_simple": terms.simple, "held_vlb": terms.vlb}
        return row | self._distances((terms.x0 + 1) / 2, batch)

    def _distances(self, picture: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the distances of `picture`, and of the codec's (`_msh`), to the photographs."""
        row = {
            "held_mse": F.mse_loss(picture, batch.x),
            "held_mse_msh": F.mse_loss(batch.x_hat, batch.x),
        }
        for name, distance in TEXTURE.items():
            row[f"held_{name}"] = distance(picture, batch.x)
            row[f"held_{name}_msh"] = distance(batch.x_hat, batch.x)
        if self.lpips is not None:
            row["held_lpips"] = self.lpips(picture, batch.x).mean()
            row["held_lpips_msh"] = self.lpips(batch.x_hat, batch.x).mean()
        return row

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """Write `decoder.safetensors`: float16, with the configuration of network and run."""
        net = self.network.net
        tensors = {k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}
        metadata = {"config": json.dumps(asdict(net.config)), "train": json.dumps(card)}
        with atomic_write(Path(self.config.out) / "decoder.safetensors") as part:
            save_file(tensors, part, metadata)


def _banks(config: DiffusionConfig, device: torch.device) -> tuple[Bank, Bank, Bank | None]:
    """Return the banks of training and held-out photographs, read or encoded, and of `--others`.

    Raises `ValueError` if one has no photograph as large as a crop, or is to be trained on and has
    held-out photographs.
    """
    others = None
    if config.bank:
        banks = (
            Bank.read(Path(config.bank), device, held_out=False),
            Bank.read(Path(config.held_out), device, held_out=True),
        )
        if config.others:
            others = Bank.read_hidden(Path(config.others), banks[0].latents, device)
    else:
        codecs = Path(config.codecs) if config.codecs else None
        files, held_out = (photos.photographs(Path(config.photos), held) for held in (False, True))
        banks = (
            Bank.encode(files, config.qualities, codecs, config.variants, device),
            Bank.encode(held_out, config.qualities, codecs, 1, device),
        )
    for bank in (*banks, others):
        if bank and max(bank.sampler.shortest) * STRIDE_Y < config.crop:
            raise ValueError(
                f"no photograph is as large as a crop of {config.crop} pixels; lower --crop"
            )
    return *banks, others


def _initial_net(
    config: DiffusionConfig,
    configuration: UNetConfig,
    bank: Bank,
    init: Mapping[str, Tensor] | None,
    wide: UNet | None,
) -> UNet:
    """Return a network of `configuration`: that of `wide` narrowed, or one of random weights.

    Tensors of `init` with a fitting name and shape replace random ones. Qualities of `bank` that
    the weights were not trained on start from the nearest one. Raises `WeightsError` if no tensor
    fits, or if `wide` is not larger.
    """
    if wide is not None:
        net = _narrowed(wide, configuration, config, bank)
    else:
        net = UNet(configuration)
        if not config.paper:
            network.measure_scales(net, bank)
    if init is not None and not network.load_into(net, init, config.other_codec):
        raise WeightsError(
            f"{config.init}: nothing in it fits this network; check --preset and --widths"
        )
    if not config.paper:
        network.add_qualities(net, bank)
    return net


def _read_network(file: Path) -> UNet:
    return read_network(*checkpoint.read(file), file)


def _narrowed(wide: UNet, small: UNetConfig, config: DiffusionConfig, bank: Bank) -> UNet:
    """Return `wide` narrowed to `small` by its use of training crops."""
    device = bank.qualities.device
    generator = torch.Generator(device).manual_seed(config.seed)
    batch = bank.batch(NARROWING_CROPS, config.crop, generator)

    def run() -> None:
        denoise = network.Network(wide, device, bf16=False, compiled=False).denoiser_for(batch, 1.0)
        denoise(_noise(batch.x, generator), torch.ones(len(batch.x), device=device))

    return narrow(wide, small, run)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
