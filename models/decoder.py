"""The diffusion decoder: the codec's latents to a picture that a sampler draws."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint, sampler
from models.errors import WeightsError
from models.hyperprior import Latents
from models.tiers import Settings
from models.unet import Maps, UNet, UNetConfig, high_pass

OnPicture = Callable[[int, int, Callable[[], Tensor]], None]
"""(steps done, steps in all, the estimate so far: (1, 3, H, W) in [0, 1]); may raise `Canceled`."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """One set of diffusion weights, ready to run."""

    weights_id: str
    net: UNet

    def sample(
        self,
        latents: Latents,
        x_hat: Tensor,
        quality: int,
        settings: Settings,
        seed: int,
        on_step: OnPicture | None = None,
    ) -> Tensor:
        """Draw the picture that belongs to `latents`: (1, 3, H, W) in [0, 1], still padded.

        `x_hat` (1, 3, H, W) is the codec's picture of the same latents, sides multiples of 64.
        `on_step(step, steps, picture)` may call `picture` for the current estimate; what it raises
        ends the work.
        """
        with torch.inference_mode():
            maps = self._maps(latents, x_hat, quality, settings.beta)
            scale = self.net.scales[quality]
            number = torch.tensor([quality])
            beta = torch.tensor([settings.beta])

            def denoise(x_t: Tensor, t: float) -> Tensor:
                v: Tensor = self.net.denoiser(
                    x_t.contiguous(memory_format=torch.channels_last),
                    torch.tensor([t]),
                    maps,
                    number,
                    beta,
                )
                return v

            def picture(x0: Tensor) -> Tensor:
                return (x_hat + scale * high_pass(x0)).clamp(0, 1)

            def report(step: int, steps: int, x0: Tensor) -> None:
                if on_step is not None:
                    on_step(step, steps, lambda: picture(x0))

            shape = (3, x_hat.shape[2], x_hat.shape[3])
            return picture(sampler.sample(denoise, shape, settings, seed, report)).contiguous()

    def _maps(self, latents: Latents, x_hat: Tensor, quality: int, beta: float) -> Maps:
        maps: Maps = self.net.conditioner(
            x_hat.contiguous(memory_format=torch.channels_last),
            latents.y_hat,
            torch.from_numpy(latents.bits)[None, None],
            torch.tensor([quality]),
            torch.tensor([beta]),
            torch.ones(1),
        )
        return maps


def load(folder: Path = checkpoint.WEIGHTS) -> Decoder:
    """The shipped decoder; `WeightsError` where the manifest names none or it is altered."""
    for entry in checkpoint.manifest(folder):
        if entry.kind == "decoder":
            tensors, metadata = checkpoint.load_with_metadata(entry, folder)
            return Decoder(entry.weights_id, _network(tensors, metadata, folder / entry.file))
    raise WeightsError(f"{folder}: the manifest names no diffusion decoder")


def _network(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> UNet:
    try:
        config = json.loads(metadata["config"])
        net = UNet(UNetConfig(**{**config, "widths": tuple(config["widths"])}))
        net.load_state_dict({k: v.float() for k, v in tensors.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise WeightsError(f"{file}: no diffusion decoder: {e}") from e
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
