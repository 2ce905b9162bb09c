"""Diffusion decoder: draws a realistic picture from the codec's latents."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint, processor, tiles
from models.codec.hyperprior import Latents
from models.diffusion import noise, sampler, schedule
from models.diffusion.conditioner import Condition, Maps
from models.diffusion.presets import UNetConfig
from models.diffusion.realism import high_pass
from models.diffusion.sampler import DenoiserOutput
from models.diffusion.unet import UNet, read_network
from models.errors import WrongWeights
from models.geometry import STRIDE_Y
from models.tiers import Settings

PRECISION_VARIABLE = "AFTERIMAGE_DIFFUSION_PRECISION"
"""Environment variable: f32, bf16, or auto (default): bf16 on GPUs and on CPUs that compute in it,
which then need 40 % less time."""

OnWindow = Callable[[], None]
"""Called after each window. If it raises an exception, the sampling ends."""
OnPicture = Callable[[int, int, Callable[[], Tensor]], None]
"""Called after each step with (steps done, total steps, preview). `preview()` computes the current
estimate of the pictures, (B, 3, H, W) in [0, 1]. If the callback raises an exception, for example
`Canceled`, the sampling ends."""

WINDOW = 1_390_000 // STRIDE_Y**2
"""Largest number of latent positions per network call; larger pictures are computed in windows. Up
to this size, activations of 96 channels at 1/4 of the picture's size stay below 32 MiB. glibc
reuses the memory of such blocks; it requests larger ones from the kernel each time."""
OVERLAP = 4
"""Latent positions around a window of the compact denoiser. The receptive field's radius is up to
98 pixels, but pixels beyond 64 change the final picture by 0.03/255 at most (measured; 0.34 beyond
48 pixels, 0 beyond 96)."""
LEAST_WINDOW = 24**2
"""Smallest window in latent positions; smaller windows would consist mostly of overlap."""
CONDITION_OVERLAP = 8
"""Latent positions around a window of the conditioner, whose receptive field's radius is 120
pixels."""


@dataclass(frozen=True, slots=True)
class DiffusionInput:
    """One picture to draw: the latents and the codec's picture of a bitstream."""

    latents: Latents
    x_hat: Tensor  # (1, 3, H, W) in [0, 1], sides multiples of 64
    quality: int
    seed: int
    latents_visible: bool = True  # False: the network was not trained with this codec's latents


class Decoder:
    """Diffusion weights on one device."""

    def __init__(
        self,
        weights_id: str,
        net: UNet,
        device: torch.device | None = None,
        codecs: Collection[str] | None = None,
    ) -> None:
        """Move `net` to `device` (default: CPU).

        `codecs` are the weights ids of the codecs that it was trained with; None if unknown.
        """
        self.weights_id, self.codecs = weights_id, codecs
        self.device = device or torch.device("cpu")
        net = net.eval().requires_grad_(False)
        self.net: UNet = net.to(self.device).to(memory_format=torch.channels_last)
        self.bf16 = _bf16(self.device)

    @property
    def config(self) -> UNetConfig:
        """Configuration of the network."""
        return self.net.config

    @property
    def process(self) -> schedule.Schedule:
        """The forward process that the network was trained with."""
        return schedule.discrete() if self.config.preset == "paper" else schedule.Continuous()

    def nearest_quality(self, quality: int) -> int:
        """The trained quality closest to `quality`."""
        trained = self.net.trained_qualities()
        return min(trained, key=lambda q: abs(q - quality), default=quality)

    def sample(
        self,
        latents: Latents,
        x_hat: Tensor,
        quality: int,
        settings: Settings,
        seed: int,
        on_step: OnPicture | None = None,
        latents_visible: bool = True,
    ) -> Tensor:
        """Draw the picture of `latents`: (1, 3, H, W) in [0, 1], still padded.

        `x_hat` (1, 3, H, W) is the codec's picture of the same latents, sides multiples of 64.
        With `latents_visible=False` the network does not see `y_hat`, which may then have any
        number of channels. Raises the errors of `sample_batch`.
        """
        picture = DiffusionInput(latents, x_hat, quality, seed, latents_visible)
        return self.sample_batch([picture], settings, on_step)

    def sample_batch(
        self,
        inputs: Sequence[DiffusionInput],
        settings: Settings,
        on_step: OnPicture | None = None,
        on_window: OnWindow = lambda: None,
        window: int = WINDOW,
    ) -> Tensor:
        """Draw pictures of equal shape in one batch: (B, 3, H, W) in [0, 1].

        Each picture is the same as in a batch of one, except for the differences described at
        `OVERLAP` where a batch needs smaller windows on a CPU. `window` limits the latent positions
        per network call (on a GPU: per picture), and thereby memory; values below `LEAST_WINDOW`
        have no effect. Raises `ValueError` if shapes differ or visible latents have a wrong number
        of channels, `WrongWeights` if latents are hidden from the paper's network.
        """
        shapes = {item.x_hat.shape for item in inputs}
        if len(shapes) != 1:
            several = sorted(map(tuple, shapes))
            raise ValueError(f"a batch needs pictures of one shape; these have {several}")
        with torch.inference_mode():
            return _BatchSampler(self, inputs, settings, on_window, window).run(on_step).cpu()

    def denoiser(self, item: DiffusionInput) -> sampler.Denoise:
        """Return the denoiser for one picture, as posterior sampling (beta 0) uses it.

        It takes and returns CPU tensors. Raises the errors of `sample_batch`.
        """
        batch = _BatchSampler(self, [item], Settings("ddim", 1), lambda: None, WINDOW)

        @torch.inference_mode()
        def denoise(x_t: Tensor, t: float, a: float) -> DenoiserOutput:
            out = batch.denoise(x_t.to(self.device), t, a)
            fraction = None if out.fraction is None else out.fraction.cpu()
            return DenoiserOutput(out.x0.cpu(), out.eps.cpu(), fraction)

        return denoise

    def target(self, item: DiffusionInput, x: Tensor) -> Tensor:
        """The x0 that stands for the original `x` (1, 3, H, W) in [0, 1], padded like `x_hat`."""
        if self.config.target == "image":
            return x * 2 - 1
        scale = float(self.net.scales[self.nearest_quality(item.quality)])
        return high_pass(x - item.x_hat) / scale


class _BatchSampler:
    """Sampling of one batch; the constructor computes the feature maps for all steps."""

    def __init__(
        self,
        decoder: Decoder,
        inputs: Sequence[DiffusionInput],
        settings: Settings,
        on_window: OnWindow,
        window: int,
    ) -> None:
        self.config, self.process, self.settings = decoder.config, decoder.process, settings
        self.seeds = [item.seed for item in inputs]
        self.condition = _condition(decoder, inputs, settings.beta)
        self.network = _WindowedNetwork(decoder, window, on_window)
        self.maps = self.network.maps(self.condition)
        self.blind_maps: Maps | None = None
        if settings.guidance != 1 and any(item.latents_visible for item in inputs):
            hidden = torch.zeros_like(self.condition.latents_visible)
            self.blind_maps = self.network.maps(replace(self.condition, latents_visible=hidden))

    def run(self, on_step: OnPicture | None) -> Tensor:
        """Run the sampler; return the pictures (B, 3, H, W) in [0, 1]."""

        def report(step: int, steps: int, x0: Tensor) -> None:
            if on_step is not None:
                on_step(step, steps, lambda: self._picture(x0).cpu())

        x0 = sampler.sample(self.denoise, self._noise, self.settings, report, self.process)
        return self._picture(x0).contiguous()

    def denoise(self, x_t: Tensor, t: float, a: float) -> DenoiserOutput:
        """Estimate x0 and eps from x_t, with autoguidance if the settings ask for it."""
        out = self._denoise(x_t, t, a, self.maps)
        if self.blind_maps is None:
            return out
        blind = self._denoise(x_t, t, a, self.blind_maps)
        w = self.settings.guidance
        x0, eps = torch.lerp(blind.x0, out.x0, w), torch.lerp(blind.eps, out.eps, w)
        return DenoiserOutput(x0, eps, out.fraction)

    def _denoise(self, x_t: Tensor, t: float, a: float, maps: Maps) -> DenoiserOutput:
        out = self.network.predict(x_t, t, maps, self.condition)
        if self.config.prediction == "v":
            x0, eps = schedule.x0_from_v(x_t, out, a), schedule.eps_from_v(x_t, out, a)
            return DenoiserOutput(x0, eps)
        # as in the paper's code: clip x0 to the range of pictures, then derive eps from it
        x0 = schedule.x0_from_eps(x_t, out[:, :3], a).clamp(-1, 1)
        fraction = (out[:, 3:] + 1) / 2 if self.config.learned_variance else None
        return DenoiserOutput(x0, schedule.eps_from_x0(x_t, x0, a), fraction)

    def _noise(self, draw: int) -> Tensor:
        _, channels, height, width = self.condition.x_hat.shape
        shape, device = (channels, height, width), self.condition.x_hat.device
        return torch.cat([noise.normals(seed, draw, shape, device=device) for seed in self.seeds])

    def _picture(self, x0: Tensor) -> Tensor:
        if self.config.target == "image":
            return ((x0 + 1) / 2).clamp(0, 1)
        scales = self.network.net.scales[self.condition.quality][:, None, None, None]
        return (self.condition.x_hat + scales * high_pass(x0)).clamp(0, 1)


class _WindowedNetwork:
    """A U-Net that computes large pictures in overlapping windows, in bounded memory."""

    def __init__(self, decoder: Decoder, window: int, on_window: OnWindow) -> None:
        self.net, self.config, self.device = decoder.net, decoder.config, decoder.device
        self.bf16 = decoder.bf16
        self.window, self.on_window = window, on_window

    def maps(self, condition: Condition) -> Maps:
        """Feature maps of `condition`, each window with the conditioner's full overlap."""
        rows, columns = condition.y_hat.shape[2:]
        strides = self.config.map_strides
        maps: list[Tensor] = []
        for w in self._windows(condition.x_hat, CONDITION_OVERLAP):
            x_hat, y_hat, bits = tiles.cut(
                w, [condition.x_hat, condition.y_hat, condition.bits], [1, STRIDE_Y, STRIDE_Y]
            )
            part = replace(condition, x_hat=x_hat, y_hat=y_hat, bits=bits)
            with self._precision():
                computed: Maps = self.net.conditioner(part)
            if not maps:
                maps = [
                    m.new_empty(len(m), m.shape[1], rows * STRIDE_Y // s, columns * STRIDE_Y // s)
                    for m, s in zip(computed, strides, strict=True)
                ]
            for whole, m, s in zip(maps, computed, strides, strict=True):
                whole[w.writes(STRIDE_Y // s)] = m[w.within(STRIDE_Y // s)]
            self.on_window()
        return tuple(maps)

    def predict(self, x_t: Tensor, t: float, maps: Maps, condition: Condition) -> Tensor:
        """Output of the denoiser (B, 3 or 6, H, W) for `x_t` (B, 3, H, W) at time `t`."""
        times = torch.full_like(condition.beta, t)
        whole: Tensor | None = None
        for w in self._windows(x_t, self._overlap):
            (part,) = tiles.cut(w, [x_t], [1])
            map_parts = tiles.cut(w, maps, self.config.map_strides)
            with self._precision():
                computed: Tensor = self.net.denoiser(
                    part, times, map_parts, condition.quality, condition.beta
                )
            if whole is None:
                whole = x_t.new_empty(len(x_t), computed.shape[1], *x_t.shape[2:])
            whole[w.writes(STRIDE_Y)] = computed[w.within(STRIDE_Y)]
            self.on_window()
        assert whole is not None
        return whole

    @property
    def _overlap(self) -> int:
        """Latent positions around a denoiser's window."""
        paper = self.config.preset == "paper"
        return -(-self.config.halo // STRIDE_Y) if paper else OVERLAP

    def _windows(self, x: Tensor, overlap: int) -> Iterable[tiles.Window]:
        """Windows of `x` (B, C, H, W); on a CPU, a batch of them has `window` positions."""
        rows, columns = x.shape[2] // STRIDE_Y, x.shape[3] // STRIDE_Y
        pictures = 1 if self.device.type == "cuda" else len(x)
        area = max(self.window // pictures, LEAST_WINDOW)
        return tiles.windows(rows, columns, area, overlap)

    def _precision(self) -> torch.autocast:
        """bfloat16 inside the networks, if chosen; the sampler's own tensors stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16)


def _bf16(device: torch.device) -> bool:
    """Return True if networks on `device` compute in bfloat16."""
    chosen = processor.precision(PRECISION_VARIABLE, "auto", "bf16", "f32")
    if chosen != "auto":
        return chosen == "bf16"
    return device.type == "cuda" or processor.has_bfloat16()


def _condition(decoder: Decoder, inputs: Sequence[DiffusionInput], beta: float) -> Condition:
    """The network's conditioning on `inputs`, on the decoder's device.

    Raises `ValueError` if visible latents have a wrong number of channels, and `WrongWeights` if
    latents are hidden from the paper's network.
    """
    if decoder.config.preset == "paper" and not all(item.latents_visible for item in inputs):
        raise WrongWeights("this diffusion decoder needs latents of the codec it belongs to")
    device = decoder.device
    y_hat = torch.cat([_visible_latents(item, decoder.config.latents) for item in inputs])
    bits = torch.stack([torch.from_numpy(item.latents.bits)[None] for item in inputs])
    qualities = [decoder.nearest_quality(item.quality) for item in inputs]
    return Condition(
        x_hat=torch.cat([item.x_hat for item in inputs]).to(device),
        y_hat=y_hat.to(device),
        bits=bits.to(device),
        quality=torch.tensor(qualities, device=device),
        beta=torch.full((len(inputs),), beta, device=device),
        latents_visible=torch.tensor(
            [float(item.latents_visible) for item in inputs], device=device
        ),
    )


def _visible_latents(item: DiffusionInput, channels: int) -> Tensor:
    """`y_hat` (1, `channels`, h, w), or zeros of this shape if the latents are hidden."""
    y_hat = item.latents.y_hat
    if not item.latents_visible:
        return y_hat.new_zeros(1, channels, *y_hat.shape[2:])
    if y_hat.shape[1] != channels:
        raise ValueError(f"latents have {y_hat.shape[1]} channels; the network needs {channels}")
    return y_hat


def load_all(
    folder: Path = checkpoint.WEIGHTS, device: torch.device | None = None
) -> dict[int, Decoder]:
    """Load the decoders in the manifest in `folder`: the general one with key 0, others by steps.

    Raises `WeightsError` if there is no general one, or if a file does not match the manifest.
    """
    entries = checkpoint.decoder_entries(folder)
    return {steps: _load(entry, folder, device) for steps, entry in entries.items()}


def load(folder: Path = checkpoint.WEIGHTS, device: torch.device | None = None) -> Decoder:
    """Load the general decoder in the manifest in `folder`. Raises as `load_all` does."""
    return _load(checkpoint.decoder_entries(folder)[0], folder, device)


def _load(entry: checkpoint.Entry, folder: Path, device: torch.device | None) -> Decoder:
    tensors, metadata = checkpoint.load_with_metadata(entry, folder)
    net = read_network(tensors, metadata, folder / entry.file)
    return Decoder(entry.weights_id, net, device, _codecs(metadata))


def from_file(file: Path, device: torch.device | None = None) -> Decoder:
    """Load a decoder that a training run wrote. Raises `WeightsError` if `file` holds none."""
    tensors, metadata = checkpoint.read(file)
    net = read_network(tensors, metadata, file)
    return Decoder(checkpoint.weights_id(tensors), net, device, _codecs(metadata))


def _codecs(metadata: dict[str, str]) -> frozenset[str] | None:
    ids = metadata.get(checkpoint.CODECS)
    return None if ids is None else frozenset(json.loads(ids))
