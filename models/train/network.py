"""The U-Net as the trainer calls it: built, measured, cast and compiled as the run asks."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from models.diffusion.conditioner import Condition, Conditioner, Maps
from models.diffusion.presets import PRESETS, UNetConfig
from models.diffusion.realism import high_pass
from models.diffusion.unet import UNet
from models.train.bank import Bank, Batch
from models.train.losses import Denoise

MEASURED = 100
"""Photographs of each quality that the residual's scale is measured on."""


class Network:
    """A U-Net on the device; `given` binds it to a batch's condition."""

    def __init__(self, net: UNet, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.device, self.bf16 = device, bf16
        self._conditioner: Callable[..., Maps] = net.conditioner
        self._denoiser: Callable[..., Tensor] = net.denoiser
        if compiled:
            self._conditioner = torch.compile(net.conditioner)
            self._denoiser = torch.compile(net.denoiser)

    def given(self, batch: Batch, beta: float, keep: Tensor | None = None) -> Denoise:
        """The denoiser of this batch; the maps are computed here, once. `keep` None keeps all."""
        n = len(batch.x)
        betas = torch.full((n,), beta, device=self.device)
        keep = torch.ones(n, device=self.device) if keep is None else keep
        x_hat = batch.x_hat.contiguous(memory_format=torch.channels_last)
        condition = Condition(x_hat, batch.y_hat, batch.bits, batch.quality, betas, keep)
        # each call has a context of its own: the casts of a no-grad call must not serve the next
        with self._cast():
            maps = self._conditioner(condition)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            with self._cast():
                out = self._denoiser(x_t, t.float(), maps, batch.quality, betas)
            return out.float()

        return denoise

    def scale(self, batch: Batch) -> Tensor:
        """Unit of the residual, (B, 1, 1, 1)."""
        return self.net.scales[batch.quality][:, None, None, None]

    def residual(self, batch: Batch) -> Tensor:
        """x0 of the compact presets: what the codec lost above the lowest band."""
        return high_pass(batch.x - batch.x_hat) / self.scale(batch)

    def picture(self, batch: Batch, x0: Tensor) -> Tensor:
        """(B, 3, s, s), not clamped."""
        return batch.x_hat + self.scale(batch) * high_pass(x0)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def build(preset: str, widths: tuple[int, ...], latents: int) -> UNet:
    """The preset's network for `latents` channels; `ValueError` for widths of other levels."""
    config: UNetConfig = replace(PRESETS[preset], latents=latents)
    if widths:
        if len(widths) != len(config.widths):
            raise ValueError(f"widths {widths}: {preset} has {len(config.widths)} levels")
        maps = widths[-len(config.condition) :]  # the compact condition is added: widths must agree
        condition = config.condition if preset == "paper" else maps
        config = replace(config, widths=widths, condition=condition)
    return UNet(config)


def measure(net: UNet, bank: Bank) -> None:
    """Set the residual's scale per quality and the latents' scale per channel from `bank`."""
    x, x_hat, y_hat = (bank.fields[name] for name in ("x", "x_hat", "y_hat"))
    for quality in sorted(set(bank.quality_of)):
        own = [i for i, q in enumerate(bank.quality_of) if q == quality][:MEASURED]
        residuals = [high_pass((x.get(i).float() - x_hat.get(i).float())[None] / 255) for i in own]
        squares = torch.stack([r.square().sum() for r in residuals]).sum()
        net.scales[quality] = (squares / sum(r.numel() for r in residuals)).sqrt()
    if isinstance(net.conditioner, Conditioner):
        some = [y_hat.get(i).float().flatten(1) for i in range(0, len(bank.quality_of), 5)]
        squares = torch.stack([y.square().sum(1) for y in some]).sum(0)
        power = squares / sum(y.shape[1] for y in some)
        net.conditioner.latent_scale.copy_(1 / power.sqrt().clamp(min=0.1))


def load_into(net: UNet, start: Mapping[str, Tensor], other_codec: bool = False) -> int:
    """Copy what fits from `start`, and say how many tensors; others keep their start values.

    So does what depends on the codec if the weights belong to `other_codec`: the layers that read
    its latents, and the scales that were measured.
    """
    latents = "conditioner." if net.config.preset == "paper" else "conditioner.latent"
    kept = ("scales", latents) if other_codec else ()
    state = net.state_dict()
    fits = [k for k, v in start.items() if k in state and state[k].shape == v.shape]
    for name in fits:
        if not name.startswith(kept):
            state[name].copy_(start[name])
    return len(fits)
