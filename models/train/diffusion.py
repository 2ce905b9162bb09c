"""Training of the diffusion decoder on a bank of encoded photographs.

Phase 1 (beta 0) is a pure denoiser with a v-loss; phase 2 (half of each batch beta 1) teaches the
few-step perceptual decoder on the model's own trajectories, with an LPIPS term.
"""

import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from models import schedule
from models.sampler import ddim_step
from models.train.bank import Bank, Batch
from models.train.lpips import Lpips
from models.unet import Maps, UNet, UNetConfig, high_pass

FEW_STEPS = (1.0, 0.75, 0.5, 0.25)
"""Times of the perceptual decoder's calls: DDIM in four steps."""
LPIPS_UNTIL = 0.5
"""LPIPS is asked for at these times and below; above, the picture is not yet decided."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run; recorded with the weights it makes."""

    bank: str
    held_out: str
    out: str
    plan: tuple[tuple[str, float], ...]  # (phase1 | phase2, minutes)
    init: str = ""
    lpips: str = ""
    batch: int = 8
    crop: int = 128
    lr: float = 4e-4
    lr_phase2: float = 2e-4
    drop_latents: float = 0.12
    mse_weight: float = 0.2
    mse_allowance: float = 1.5  # x the codec's own error, beyond which MSE weighs more
    seed: int = 0
    compile: bool = False


class Trainer:
    """The state of a run: network, average, optimiser, clock."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bank = Bank(Path(config.bank))
        self.held_out = Bank(Path(config.held_out))
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        latents = self.bank.items[0][1]["y_hat"].shape[0]
        self.net = UNet(UNetConfig(latents=latents))
        if config.init:
            load_into(self.net, Path(config.init))
        else:
            self._measure()
        self.net.to(self.device).to(memory_format=torch.channels_last)
        self.conditioner: nn.Module = self.net.conditioner
        self.denoiser: nn.Module = self.net.denoiser
        if config.compile:
            self.conditioner = torch.compile(self.conditioner)  # type: ignore[assignment]
            self.denoiser = torch.compile(self.denoiser)  # type: ignore[assignment]
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.optimiser = self._optimiser()
        self.stage, self.spent, self.step = 0, 0.0, 0
        self.lpips = Lpips(Path(config.lpips), self.device) if config.lpips else None
        self.stopping = False
        if (self.out / "state.pt").exists():
            self._resume()

    def run(self) -> None:
        """Train until the plan is fulfilled, or until SIGTERM or SIGINT."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stopping = True

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)
        self.save()  # a folder that cannot be written is known now, not after minutes
        while self.stage < len(self.config.plan) and not self.stopping:
            self._run_stage(*self.config.plan[self.stage])

    def _run_stage(self, phase: str, minutes: float) -> None:
        budget = minutes * 60
        begun, saved, reported = time.monotonic() - self.spent, time.monotonic(), time.monotonic()
        sums, count = {}, 0  # type: dict[str, float], int
        bar = tqdm(total=round(budget), initial=round(self.spent), desc=phase, unit="s")
        while (now := time.monotonic()) - begun < budget and not self.stopping:
            self.spent = now - begun
            bar.n = round(self.spent)
            losses = self._step(phase, self.spent / budget)
            if not math.isfinite(losses["loss"]):
                self._fall_back()
                continue
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + v
            count += 1
            if now - reported > 30:
                means = {k: round(v / count, 4) for k, v in sums.items()}
                self._log({"phase": phase, "step": self.step, "s": round(self.spent), **means})
                bar.set_postfix(means)
                sums, count, reported = {}, 0, now
            if now - saved > 120:
                self.save()
                saved = now
        bar.close()
        if not self.stopping:
            self._log({"phase": phase, "step": self.step, **self.validate()})
            self.stage, self.spent = self.stage + 1, 0.0
            self.net.load_state_dict(self.average)
            self.optimiser = self._optimiser()
        self.save()

    def _step(self, phase: str, part: float) -> dict[str, float]:
        top = self.config.lr if phase == "phase1" else self.config.lr_phase2
        warm = min(1.0, (self.step + 1) / 200)
        rate = top * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self._batch(self.bank, self.config.batch)
        if phase == "phase1":
            loss = self._denoising_loss(batch, torch.zeros(len(batch.x)))
            parts = {"v": loss.item()}
        else:
            half = len(batch.x) // 2
            v_loss = self._denoising_loss(_rows(batch, slice(half)), torch.zeros(half))
            perceptual, parts = self._perceptual_loss(_rows(batch, slice(half, None)))
            loss = v_loss + perceptual
            parts["v"] = v_loss.item()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        if math.isfinite(loss.item()):
            self.optimiser.step()
            self.step += 1
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            state = self.net.state_dict()
            names = [k for k, v in state.items() if v.is_floating_point()]
            torch._foreach_lerp_(
                [self.average[k] for k in names], [state[k] for k in names], 1 - decay
            )
        return {"loss": loss.item(), **parts}

    def _denoising_loss(self, batch: Batch, beta: Tensor) -> Tensor:
        """v-loss at stratified times, weighted by clamp(SNR, 1, 5) / (SNR + 1)."""
        n = len(batch.x)
        t = (torch.arange(n) + torch.rand(n, generator=self.generator)) / n
        t = t[torch.randperm(n, generator=self.generator)].to(self.device)
        alpha, sigma = schedule.alpha_sigma(t)
        x0 = self._target(batch)
        eps = torch.randn(x0.shape, generator=self.generator).to(self.device)
        v = self._denoise(alpha * x0 + sigma * eps, t, self._maps(batch, beta), batch, beta)
        snr = (alpha / sigma.clamp(min=1e-4)) ** 2
        weight = (snr.clamp(1, 5) / (snr + 1)).flatten()
        return (weight * (v - (alpha * eps - sigma * x0)).square().mean((1, 2, 3))).mean()

    def _perceptual_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """MSE and LPIPS of x0 at a time that the model's own DDIM rollout reached."""
        beta = torch.ones(len(batch.x))
        maps = self._maps(batch, beta)
        target = self._target(batch)
        calls = int(torch.randint(len(FEW_STEPS), (), generator=self.generator))
        with torch.no_grad():
            x_t = self._rollout(maps, batch, beta, calls)
        t = FEW_STEPS[calls]
        times = torch.full((len(target),), t, device=self.device)
        v = self._denoise(x_t, times, maps, batch, beta)
        x0 = schedule.x0_from_v(x_t, v, schedule.alpha_bar(t))
        mse = (x0 - target).square().mean()
        own = target.square().mean()  # the codec's picture is x0 = 0
        excess = (mse / own).item() > self.config.mse_allowance
        loss = (3.0 if excess else 1.0) * self.config.mse_weight * mse
        parts = {"ratio": (mse / own).item()}
        if self.lpips is not None and FEW_STEPS[calls] <= LPIPS_UNTIL:
            picture = batch.x_hat + self._scale(batch) * high_pass(x0)
            distance = self.lpips(picture, batch.x).mean()
            loss = loss + distance
            parts["lpips"] = distance.item()
        return loss, parts

    def _rollout(self, maps: Maps, batch: Batch, beta: Tensor, calls: int) -> Tensor:
        """x_t after `calls` DDIM steps from noise along `FEW_STEPS`; after all of them, x0."""
        times = (*FEW_STEPS, 0.0)
        x_t = torch.randn(batch.x.shape, generator=self.generator).to(self.device)
        for t, t_prev in zip(times[:calls], times[1:], strict=False):
            a_t, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
            now = torch.full((len(x_t),), t, device=self.device)
            v = self._denoise(x_t, now, maps, batch, beta)
            x0, eps = schedule.x0_from_v(x_t, v, a_t), schedule.eps_from_v(x_t, v, a_t)
            x_t = ddim_step(x_t, x0, eps, a_t, a_prev, 0.0, torch.zeros_like(x0))
        return x_t

    @torch.no_grad()
    def validate(self, crops: int = 64) -> dict[str, float]:
        """Averaged weights on fixed held-out crops: v-loss, and the few-step picture's figures."""
        own, generator = self.net.state_dict(), self.generator
        own = {k: v.clone() for k, v in own.items()}
        self.net.load_state_dict(self.average)
        self.generator = torch.Generator().manual_seed(1)
        rows: list[dict[str, float]] = []
        for _ in range(crops // 8):
            batch = self._batch(self.held_out, 8)
            row = {"held_v": self._denoising_loss(batch, torch.zeros(8)).item()}
            beta = torch.ones(8)
            maps = self._maps(batch, beta)
            x0 = self._rollout(maps, batch, beta, len(FEW_STEPS))
            picture = (batch.x_hat + self._scale(batch) * high_pass(x0)).clamp(0, 1)
            row["held_mse"] = F.mse_loss(picture, batch.x).item()
            row["held_mse_msh"] = F.mse_loss(batch.x_hat, batch.x).item()
            if self.lpips is not None:
                row["held_lpips"] = self.lpips(picture, batch.x).mean().item()
                row["held_lpips_msh"] = self.lpips(batch.x_hat, batch.x).mean().item()
            rows.append(row)
        self.net.load_state_dict(own)
        self.generator = generator
        return {k: round(sum(r[k] for r in rows) / len(rows), 5) for k in rows[0]}

    def save(self) -> None:
        """Write state and averaged weights atomically; a run resumes from the former."""
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "clock": (self.stage, self.spent, self.step),
        }
        part = self.out / "state.part"
        torch.save(state, part)
        os.replace(part, self.out / "state.pt")
        tensors = {k: v.half().cpu().contiguous() for k, v in self.average.items()}
        metadata = {"config": json.dumps(asdict(self.net.config)), "train": self._card()}
        save_file(tensors, self.out / "decoder.part", metadata)
        os.replace(self.out / "decoder.part", self.out / "decoder.safetensors")

    def _card(self) -> str:
        own = {k: v for k, v in asdict(self.config).items() if k not in {"bank", "held_out", "out"}}
        own = {k: Path(v).name if k in {"init", "lpips"} else v for k, v in own.items()}
        return json.dumps({**own, "steps": self.step, "device": self.device.type})

    def _resume(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.stage, self.spent, self.step = state["clock"]
        self._log({"resumed": self.stage, "s": round(self.spent), "step": self.step})

    def _fall_back(self) -> None:
        self._log({"not finite": self.step})
        self.net.load_state_dict(self.average)
        self.optimiser = self._optimiser()

    def _log(self, row: dict[str, object]) -> None:
        with (self.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")

    def _optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.net.parameters(), self.config.lr, (0.9, 0.99), weight_decay=0.01, fused=True
        )

    def _measure(self) -> None:
        """Set the residual's scale per quality and the latents' scale per channel from the bank."""
        for quality in sorted({q for q, _ in self.bank.items}):
            items = [t for q, t in self.bank.items if q == quality][:100]
            power = [high_pass((t["x"].float() - t["x_hat"].float())[None] / 255) for t in items]
            self.net.scales[quality] = (
                torch.cat([r.flatten() for r in power]).square().mean().sqrt()
            )
        latents = torch.cat([t["y_hat"].float().flatten(1) for _, t in self.bank.items[::5]], 1)
        self.net.conditioner.latent_scale.copy_(1 / latents.square().mean(1).sqrt().clamp(min=0.1))

    def _batch(self, bank: Bank, n: int) -> Batch:
        b = bank.batch(n, self.config.crop, self.generator)
        return Batch(*(getattr(b, k).to(self.device) for k in Batch.__slots__))

    def _scale(self, batch: Batch) -> Tensor:
        return self.net.scales[batch.quality][:, None, None, None]

    def _target(self, batch: Batch) -> Tensor:
        return high_pass(batch.x - batch.x_hat) / self._scale(batch)

    def _maps(self, batch: Batch, beta: Tensor) -> Maps:
        keep = torch.rand(len(batch.x), generator=self.generator) >= self.config.drop_latents
        keep = keep.float().to(self.device) if torch.is_grad_enabled() else torch.ones_like(beta)
        maps: Maps = self.conditioner(
            batch.x_hat.contiguous(memory_format=torch.channels_last),
            batch.y_hat,
            batch.bits,
            batch.quality,
            beta.to(self.device),
            keep.to(self.device),
        )
        return maps

    def _denoise(self, x_t: Tensor, t: Tensor, maps: Maps, batch: Batch, beta: Tensor) -> Tensor:
        v: Tensor = self.denoiser(
            x_t.contiguous(memory_format=torch.channels_last),
            t.float(),
            maps,
            batch.quality,
            beta.to(self.device),
        )
        return v


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(*(getattr(batch, k)[rows] for k in Batch.__slots__))


def load_into(net: UNet, file: Path) -> None:
    """Copy what fits from `file`; a tensor of another shape keeps its start value."""
    state = net.state_dict()
    with safe_open(file, "pt") as f:
        for name in f.keys():
            value = f.get_tensor(name)
            if name in state and state[name].shape == value.shape:
                state[name].copy_(value)
