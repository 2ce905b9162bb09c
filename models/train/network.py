"""The U-Net in training: initial weights, scales measured from data, autocast, compilation."""

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
"""Number of photographs per quality from which the scale of the residual is measured."""


class Network:
    """A U-Net on the device. `denoiser_for` binds it to the condition of a batch."""

    def __init__(self, net: UNet, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.device, self.bf16 = device, bf16
        self._conditioner: Callable[..., Maps] = net.conditioner
        self._denoiser: Callable[..., Tensor] = net.denoiser
        if compiled:
            self._conditioner = torch.compile(net.conditioner)
            self._denoiser = torch.compile(net.denoiser)

    def denoiser_for(self, batch: Batch, beta: float, keep: Tensor | None = None) -> Denoise:
        """Return the denoiser for a batch; the maps of its condition are computed once, here.

        `keep` (B,) is 0 for crops whose latents are hidden and 1 for others; None keeps all.
        """
        n = len(batch.x)
        betas = torch.full((n,), beta, device=self.device)
        keep = torch.ones(n, device=self.device) if keep is None else keep
        x_hat = batch.x_hat.contiguous(memory_format=torch.channels_last)
        condition = Condition(x_hat, batch.y_hat, batch.bits, batch.quality, betas, keep)
        # a separate context per call: weights cast without grad must not be cached for other calls
        with self._cast():
            maps = self._conditioner(condition)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            with self._cast():
                out = self._denoiser(x_t, t.float(), maps, batch.quality, betas)
            return out.float()

        return denoise

    def scale(self, batch: Batch) -> Tensor:
        """Scale of the residual per crop, (B, 1, 1, 1)."""
        return self.net.scales[batch.quality][:, None, None, None]

    def residual(self, batch: Batch) -> Tensor:
        """Return x0 of the compact presets: the codec's error without its lowest band, scaled."""
        return high_pass(batch.x - batch.x_hat) / self.scale(batch)

    def picture(self, batch: Batch, x0: Tensor) -> Tensor:
        """Return the picture with the predicted residual `x0`: (B, 3, s, s), not clamped."""
        return batch.x_hat + self.scale(batch) * high_pass(x0)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def configuration(preset: str, widths: tuple[int, ...]) -> UNetConfig:
    """Return the preset's configuration, with other `widths` unless there are none.

    Raises `ValueError` if `widths` does not have one number per level.
    """
    config = PRESETS[preset]
    if widths:
        if len(widths) != len(config.widths):
            raise ValueError(
                f"--widths has {len(widths)} numbers; {preset} has {len(config.widths)} levels"
            )
        # compact presets add the condition to the features, so its widths must be the same
        added = widths[-len(config.condition) :]
        condition = config.condition if preset == "paper" else added
        config = replace(config, widths=widths, condition=condition)
    return config


def measure_scales(net: UNet, bank: Bank) -> None:
    """Set the scale of the residual per quality and of the latents per channel from `bank`."""
    for quality in sorted(set(bank.entry_qualities)):
        net.scales[quality] = _residual_scale(bank, quality)
    if isinstance(net.conditioner, Conditioner):
        y_hat = bank.fields["y_hat"]
        latents = [y_hat.get(i).float().flatten(1) for i in range(0, len(bank.entry_qualities), 5)]
        squares = torch.stack([y.square().sum(1) for y in latents]).sum(0)
        power = squares / sum(y.shape[1] for y in latents)
        net.conditioner.latent_scale.copy_(1 / power.sqrt().clamp(min=0.1))


def add_qualities(net: UNet, bank: Bank) -> None:
    """Prepare a network of a compact preset for the qualities of `bank` that it does not know.

    Each starts from the parameters of the nearest trained quality, and gets the scale of its
    residual from `bank`.
    """
    trained = net.trained_qualities()
    for quality in sorted(set(bank.entry_qualities) - set(trained)):
        nearest = min(trained, key=lambda q: abs(q - quality))
        net.scales[quality] = _residual_scale(bank, quality)
        for name, parameter in net.named_parameters():
            if name.endswith("quality.weight"):
                parameter.data[quality] = parameter.data[nearest]
            elif f"latents.{quality}." in name:
                of_nearest = name.replace(f"latents.{quality}.", f"latents.{nearest}.")
                parameter.data.copy_(net.get_parameter(of_nearest))


def _residual_scale(bank: Bank, quality: int) -> Tensor:
    """Standard deviation of the residual of the photographs of a quality."""
    x, x_hat = bank.fields["x"], bank.fields["x_hat"]
    entries = [i for i, q in enumerate(bank.entry_qualities) if q == quality][:MEASURED]
    residuals = [high_pass((x.get(i).float() - x_hat.get(i).float())[None] / 255) for i in entries]
    squares = torch.stack([r.square().sum() for r in residuals]).sum()
    return (squares / sum(r.numel() for r in residuals)).sqrt()


def load_into(net: UNet, start: Mapping[str, Tensor], other_codec: bool = False) -> int:
    """Copy tensors of `start` whose name and shape match; return how many were copied.

    With `other_codec`, tensors that depend on the codec keep their initial values: the layers that
    read latents, and the measured scales.
    """
    latents = "conditioner." if net.config.preset == "paper" else "conditioner.latent"
    excluded = ("scales", latents) if other_codec else ()
    state = net.state_dict()
    matches = [
        name
        for name, value in start.items()
        if name in state and state[name].shape == value.shape and not name.startswith(excluded)
    ]
    for name in matches:
        state[name].copy_(start[name])
    return len(matches)
