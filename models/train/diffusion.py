"""Training of the diffusion decoder, on photographs that the codec has encoded.

Presets `compact`, `fine`: phase 1 (beta 0) is a pure denoiser with a v-loss; phase 2 (half of each
batch beta 1) teaches the few-step perceptual decoder on the model's own trajectories, with LPIPS
and, if asked for, an adversarial term. Preset `paper`: one phase, with the paper's loss.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models import checkpoint
from models.diffusion import schedule
from models.errors import WeightsError
from models.files import atomic_write
from models.geometry import STRIDE_Y
from models.train import losses, network, photos
from models.train.bank import Bank, Batch
from models.train.config import Stage
from models.train.decoder_config import DiffusionConfig
from models.train.discriminator import Discriminator, discriminator_loss, generator_loss
from models.train.distributed import Ranks
from models.train.losses import Denoise, Hybrid
from models.train.lpips import Lpips
from models.train.run import Play, Step, cosine
from models.train.soap import Soap

PERCEPTUAL_UNTIL = 0.5
"""LPIPS, spectrum and discriminator judge pictures predicted at this time or later in sampling, and
the last one. Earlier predictions are still undecided."""
JUDGED = 64
"""Held-out crops that a stage is judged by."""


class DiffusionTask:
    """What `Run` trains; see its `Task`."""

    def __init__(self, config: DiffusionConfig, ranks: Ranks) -> None:
        """`config` is `resolved`."""
        self.config, self.device = config, ranks.device
        # what can be wrong with files is known before photographs are encoded
        self.lpips = Lpips(Path(config.lpips), ranks.device) if config.lpips else None
        start = checkpoint.read(Path(config.init))[0] if config.init else None
        self.bank, self.held_out = _banks(config, ranks.device)
        for bank in (self.bank, self.held_out):
            if max(bank.draw.shortest) * STRIDE_Y < config.crop:
                raise ValueError(f"no photograph is as large as a crop of {config.crop} pixels")
        torch.manual_seed(config.seed)
        net = network.build(config.preset, config.widths, self.bank.latents)
        if not config.paper:
            network.measure(net, self.bank)
        if start is not None and not network.load_into(net, start, config.other_codec):
            raise WeightsError(f"{config.init}: nothing in it fits this network")
        bf16 = ranks.device.type == "cuda" if config.bf16 is None else config.bf16
        self.net = net
        self.network = network.Network(net, ranks.device, bf16, config.compile)
        self.modules: dict[str, nn.Module] = {"net": net}
        self.discriminator: Discriminator | None = None
        if config.adversarial:
            self.discriminator = Discriminator(self.bank.latents).to(ranks.device)
            self.modules["discriminator"] = self.discriminator
        self.hybrid = Hybrid(ranks.device)
        self.times = losses.few_steps(config.calls)

    def begin(self, index: int) -> None:
        """A stage starts from the weights as they are."""

    def optimiser(self, player: str) -> torch.optim.Optimizer:
        paper = self.config.paper
        betas, decay = ((0.9, 0.999), 0.0) if paper else ((0.9, 0.99), 0.01)
        parameters = self.modules[player].parameters()
        if player == "net" and self.config.optimiser == "soap":
            return Soap(parameters, self.config.lr)
        return torch.optim.AdamW(parameters, self.config.lr, betas, weight_decay=decay, fused=True)

    def rate(self, step: int, part: float, stage: Stage) -> float:
        """The paper's is constant; here it falls at the end of the time that there is."""
        top = self.config.lr if stage.name == "phase1" else self.config.lr_phase2
        hold = 0.8 if self.config.paper else 0.0
        return top * min(1.0, (step + 1) / max(1, self.config.warm)) * cosine(part, hold)

    def plays(self, step: Step) -> Iterator[Play]:
        batch = self.bank.batch(self.config.batch, self.config.crop, step.own)
        if self.config.paper:
            yield self._paper(batch, step)
        elif step.stage.name == "phase1":
            t = self._times(len(batch.x), step.own)
            loss, _ = self._denoising(batch, self._keep(batch, step), t, step.own)
            yield Play("net", loss, {"loss": loss.detach(), "v": loss.detach()})
        else:
            yield from self._phase2(batch, step)

    def _times(self, n: int, generator: torch.Generator) -> Tensor:
        t = losses.stratified(n, generator)
        return losses.middle(t) if self.config.times == "middle" else t

    def _denoising(
        self, batch: Batch, keep: Tensor | None, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """v-loss, and that of predicting zero."""
        x0 = self.network.residual(batch)
        denoise = self.network.given(batch, 0.0, keep)
        return losses.denoising(denoise, x0, t, _noise(x0, generator))

    def _phase2(self, batch: Batch, step: Step) -> Iterator[Play]:
        half = len(batch.x) // 2
        keep = self._keep(batch, step)
        times = self._times(half, step.own)
        v_loss, _ = self._denoising(batch.rows(slice(half)), keep[:half], times, step.own)
        batch = batch.rows(slice(half, None))
        target = self.network.residual(batch)
        denoise = self.network.given(batch, 1.0, keep[half:])
        t, x0 = self._few_steps(denoise, _noise(target, step.own), step)
        ratio = (x0 - target).square().mean() / target.square().mean()  # x0 = 0 is the codec's
        weight = torch.where(ratio.detach() > self.config.mse_allowance, 3.0, 1.0)
        loss = v_loss + self.config.mse_weight * weight * (x0 - target).square().mean()
        figures = {"v": v_loss.detach(), "ratio": ratio.detach()}
        picture = self.network.picture(batch, x0)
        judged = t <= max(PERCEPTUAL_UNTIL, self.times[-1])
        if judged and self.lpips is not None:
            top, left = _place(step, 4)
            distance = self.lpips(picture[:, :, top:, left:], batch.x[:, :, top:, left:]).mean()
            loss = loss + distance
            figures["lpips"] = distance.detach()
        if judged and self.config.spectrum:
            top, left = _place(step, losses.DCT // 2)
            apart = losses.spectrum(picture[:, :, top:, left:], batch.x[:, :, top:, left:])
            loss = loss + self.config.spectrum * apart
            figures["spectrum"] = apart.detach()
        if judged and self.discriminator and step.number >= self.config.adversarial_after:
            place = _place(step, STRIDE_Y)
            logits = self.discriminator(picture, batch.x_hat, batch.y_hat, place)
            wanted = generator_loss(logits)
            loss = loss + self.config.adversarial * wanted
            figures["adversarial"] = wanted.detach()
        yield Play("net", loss, figures | {"loss": loss.detach()})
        if judged and self.discriminator:
            place = _place(step, STRIDE_Y)
            yield self._discriminate(self.discriminator, batch, picture.detach(), place)

    def _few_steps(self, denoise: Denoise, noise: Tensor, step: Step) -> tuple[float, Tensor]:
        """One of the sampler's times and x0 predicted there, reached by the network's own rollout.

        All ranks draw the same time, so that they have the same losses.
        """
        calls = step.shared.randrange(len(self.times))
        with torch.no_grad():
            x_t = losses.rollout(denoise, noise, self.times, calls)
        t = self.times[calls]
        v = denoise(x_t, torch.full((len(x_t),), t, device=self.device))
        return t, schedule.x0_from_v(x_t, v, schedule.alpha_bar(t))

    def _discriminate(
        self, judge: Discriminator, batch: Batch, picture: Tensor, place: tuple[int, int]
    ) -> Play:
        real = judge(batch.x, batch.x_hat, batch.y_hat, place)
        made = judge(picture, batch.x_hat, batch.y_hat, place)
        loss = discriminator_loss(real, made)
        return Play("discriminator", loss, {"discriminator": loss.detach()})

    def _paper(self, batch: Batch, step: Step) -> Play:
        """L_simple + L_vlb / 1000 + rho LPIPS. The paper trains on y + U(±1/2); the latents here
        are the rounded ones that a decoder gets, so that training sees what testing does."""
        index = (losses.stratified(len(batch.x), step.own) * (self.hybrid.last + 1)).long()
        x = batch.x * 2 - 1
        terms = self.hybrid(self.network.given(batch, 0.0), x, index, _noise(x, step.own))
        loss = terms.simple + terms.vlb / 1000
        figures = {"simple": terms.simple.detach(), "vlb": terms.vlb.detach()}
        if self.lpips is not None:
            distance = self.lpips((terms.x0 + 1) / 2, batch.x).mean()
            loss = loss + self.config.rho * distance
            figures["lpips"] = distance.detach()
        return Play("net", loss, figures | {"loss": loss.detach()})

    def _keep(self, batch: Batch, step: Step) -> Tensor:
        uniform = torch.rand(len(batch.x), generator=step.own, device=self.device)
        return (uniform >= self.config.drop_latents).float()

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """On fixed held-out crops: the loss of denoising, and the few-step picture's figures."""
        generator = torch.Generator(self.device).manual_seed(1)
        rows: list[dict[str, Tensor]] = []
        for _ in range(JUDGED // 8):
            batch = self.held_out.batch(8, self.config.crop, generator)
            judge = self._judge_paper if self.config.paper else self._judge
            rows.append(judge(batch, generator))
        return {k: round(float(sum(r[k] for r in rows)) / len(rows), 5) for k in rows[0]}

    def _judge(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        t = losses.stratified(len(batch.x), generator)
        v, zero = self._denoising(batch, None, t, generator)
        denoise = self.network.given(batch, 1.0)
        x0 = losses.rollout(denoise, _noise(batch.x, generator), self.times, len(self.times))
        picture = self.network.picture(batch, x0).clamp(0, 1)
        return {"held_v": v, "held_v_zero": zero} | self._distances(picture, batch)

    def _judge_paper(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Of one call per crop; `held_simple` is 1 for predicting zero."""
        index = (losses.stratified(len(batch.x), generator) * (self.hybrid.last + 1)).long()
        x = batch.x * 2 - 1
        terms = self.hybrid(self.network.given(batch, 0.0), x, index, _noise(x, generator))
        row = {"held_simple": terms.simple, "held_vlb": terms.vlb}
        return row | self._distances((terms.x0 + 1) / 2, batch)

    def _distances(self, picture: Tensor, batch: Batch) -> dict[str, Tensor]:
        row = {
            "held_mse": F.mse_loss(picture, batch.x),
            "held_mse_msh": F.mse_loss(batch.x_hat, batch.x),
            "held_spectrum": losses.spectrum(picture, batch.x),
            "held_spectrum_msh": losses.spectrum(batch.x_hat, batch.x),
        }
        if self.lpips is not None:
            row["held_lpips"] = self.lpips(picture, batch.x).mean()
            row["held_lpips_msh"] = self.lpips(batch.x_hat, batch.x).mean()
        return row

    def export(self, stage: Stage, card: dict[str, Any]) -> None:
        """`decoder.safetensors`: float16, with the network's configuration and the run's."""
        net = self.network.net
        tensors = {k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}
        metadata = {"config": json.dumps(asdict(net.config)), "train": json.dumps(card)}
        with atomic_write(Path(self.config.out) / "decoder.safetensors") as part:
            save_file(tensors, part, metadata)


def _banks(config: DiffusionConfig, device: torch.device) -> tuple[Bank, Bank]:
    """To train on, and held out."""
    if config.bank:
        return Bank.read(Path(config.bank), device), Bank.read(Path(config.held_out), device)
    codecs = Path(config.codecs) if config.codecs else None
    files = [photos.photographs(Path(config.photos), held_out) for held_out in (False, True)]
    seen, held_out = (
        Bank.encode(own, config.qualities, codecs, variants, device)
        for own, variants in zip(files, (config.variants, 1), strict=True)
    )
    return seen, held_out


def _place(step: Step, period: int) -> tuple[int, int]:
    """Where LPIPS and the discriminator begin to look. AlexNet looks every fourth pixel, and the
    networks draw in blocks of four: always at the same place, it rewarded a hatching that it could
    not see. The discriminator's strides multiply to 16."""
    return step.shared.randrange(period), step.shared.randrange(period)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
