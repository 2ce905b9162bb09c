"""The diffusion decoder: the codec's latents to a picture that a sampler draws."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint, tiles
from models.codec.hyperprior import Latents
from models.diffusion import noise, presets, sampler, schedule
from models.diffusion.conditioner import Condition, Maps
from models.diffusion.presets import UNetConfig
from models.diffusion.realism import high_pass
from models.diffusion.sampler import Estimate
from models.diffusion.unet import UNet
from models.errors import WeightsError, WrongWeights
from models.geometry import STRIDE_Y
from models.tiers import Settings

OnTile = Callable[[], None]
"""Called between two windows of a picture; may raise, too."""
OnPicture = Callable[[int, int, Callable[[], Tensor]], None]
"""(steps done, steps in all, the estimate so far: (B, 3, H, W) in [0, 1]); may raise `Canceled`."""

WINDOW = 1_390_000 // STRIDE_Y**2
"""Latent positions that a network call reads at most; larger pictures are drawn in windows. The
finest activations of this many stay below 32 MiB, above which glibc maps each anew."""
OVERLAP = 4
"""Latent positions around a denoiser's window. It reaches up to 98 pixels, but what lies beyond 64
moves a finished picture by 0.03/255 at most (measured; at 48 pixels 0.34, at 96 nothing)."""
LEAST_WINDOW = 24**2
"""Latent positions below which windows would be little but their overlap."""
CONDITION_OVERLAP = 8
"""Latent positions around a conditioner's window: its convolutions reach 120 pixels."""


@dataclass(frozen=True, slots=True)
class DiffusionInput:
    """A picture to draw: what entropy decoding and the codec's synthesis made of a bitstream."""

    latents: Latents
    x_hat: Tensor  # (1, 3, H, W) in [0, 1], sides multiples of 64
    quality: int
    seed: int
    shown: bool = True  # False: latents of a codec that the network was not trained with


class Decoder:
    """One set of diffusion weights on one device, ready to run."""

    def __init__(
        self,
        weights_id: str,
        net: UNet,
        device: torch.device | None = None,
        codecs: Collection[str] | None = None,
    ) -> None:
        """`codecs`: ids of those whose latents it has learned; None where none are recorded."""
        self.weights_id, self.codecs = weights_id, codecs
        self.device = device or torch.device("cpu")
        net = net.eval().requires_grad_(False)
        self.net: UNet = net.to(self.device).to(memory_format=torch.channels_last)

    @property
    def config(self) -> UNetConfig:
        """The network's."""
        return self.net.config

    @property
    def process(self) -> schedule.Schedule:
        """The forward process that the network was trained with."""
        return schedule.discrete() if self.config.preset == "paper" else schedule.Continuous()

    def nearest(self, quality: int) -> int:
        """The quality closest to `quality` that the network was trained with."""
        scales = enumerate(self.net.scales.tolist())
        trained = [q for q, scale in scales if q and scale != 1]  # training measures a scale
        return min(trained, key=lambda q: abs(q - quality), default=quality)

    def sample(
        self,
        latents: Latents,
        x_hat: Tensor,
        quality: int,
        settings: Settings,
        seed: int,
        on_step: OnPicture | None = None,
        shown: bool = True,
    ) -> Tensor:
        """Draw the picture that belongs to `latents`: (1, 3, H, W) in [0, 1], still padded.

        `x_hat` (1, 3, H, W) is the codec's picture of the same latents, sides multiples of 64.
        Without `shown`, `y_hat` is hidden from the network, and may have any number of channels.
        `on_step(step, steps, picture)` may call `picture` for the current estimate; what it raises
        ends the work. Raises as `sample_batch`.
        """
        return self.sample_batch(
            [DiffusionInput(latents, x_hat, quality, seed, shown)], settings, on_step
        )

    def sample_batch(
        self,
        drafts: Sequence[DiffusionInput],
        settings: Settings,
        on_step: OnPicture | None = None,
        on_tile: OnTile = lambda: None,
        window: int = WINDOW,
    ) -> Tensor:
        """Draw pictures of one shape together: (B, 3, H, W) in [0, 1], as each alone would be.

        At most `window` latent positions are read in one network call, on a GPU of each picture:
        fewer need less memory. Below `LEAST_WINDOW` a picture is not cut finer.
        Raises `ValueError` where shapes differ or latents that are shown are not the network's,
        `WrongWeights` where a network that knows nothing but latents is not shown them.
        """
        shapes = {d.x_hat.shape for d in drafts}
        if len(shapes) != 1:
            raise ValueError(f"a batch of one shape is needed, not {sorted(map(tuple, shapes))}")
        if self.config.preset == "paper" and not all(d.shown for d in drafts):
            raise WrongWeights("this diffusion decoder draws from its own codec's latents alone")
        with torch.inference_mode():
            return _Drawing(self, drafts, settings, on_tile, window).run(on_step).cpu()

    def denoiser(self, draft: DiffusionInput) -> sampler.Denoise:
        """What a posterior sampler (beta 0) of this picture calls, on the CPU outside; errors as
        `sample_batch`."""
        drawing = _Drawing(self, [draft], Settings("ddim", 1), lambda: None, WINDOW)

        @torch.inference_mode()
        def denoise(x_t: Tensor, t: float, a: float) -> Estimate:
            e = drawing.estimate(x_t.to(self.device), t, a)
            fraction = None if e.fraction is None else e.fraction.cpu()
            return Estimate(e.x0.cpu(), e.eps.cpu(), fraction)

        return denoise

    def target(self, draft: DiffusionInput, x: Tensor) -> Tensor:
        """x0 of the picture `x` (1, 3, H, W) in [0, 1], of the shape of the draft's `x_hat`."""
        if self.config.target == "image":
            return x * 2 - 1
        scale = float(self.net.scales[self.nearest(draft.quality)])
        return high_pass(x - draft.x_hat) / scale


class _Drawing:
    """The tensors of one batch while it is drawn."""

    def __init__(
        self,
        decoder: Decoder,
        drafts: Sequence[DiffusionInput],
        settings: Settings,
        on_tile: OnTile,
        window: int,
    ) -> None:
        self.on_tile, self.window = on_tile, window
        self.net, self.config = decoder.net, decoder.config
        self.device, self.settings, self.process = decoder.device, settings, decoder.process
        paper = self.config.preset == "paper"  # for `compact` less than its reach is enough
        self.overlap = -(-self.config.halo // STRIDE_Y) if paper else OVERLAP
        self.seeds = [d.seed for d in drafts]
        self.x_hat = torch.cat([d.x_hat for d in drafts]).to(self.device)
        self.shape = (3, self.x_hat.shape[2], self.x_hat.shape[3])
        qualities = [decoder.nearest(d.quality) for d in drafts]
        self.quality = torch.tensor(qualities, device=self.device)
        self.beta = torch.full((len(drafts),), settings.beta, device=self.device)
        y_hat = torch.cat([self._latents(d) for d in drafts]).to(self.device)
        bits = torch.stack([torch.from_numpy(d.latents.bits)[None] for d in drafts])
        given = partial(Condition, self.x_hat, y_hat, bits.to(self.device), self.quality, self.beta)
        shown = torch.tensor([float(d.shown) for d in drafts], device=self.device)
        self.maps = self._maps(given(shown))
        guided = settings.guidance != 1 and any(d.shown for d in drafts)
        self.weak = self._maps(given(torch.zeros_like(shown))) if guided else None
        self.scale = 1.0 if self.config.target == "image" else self._scales()

    def run(self, on_step: OnPicture | None) -> Tensor:
        def report(step: int, steps: int, x0: Tensor) -> None:
            if on_step is not None:
                on_step(step, steps, lambda: self._picture(x0).cpu())

        x0 = sampler.sample(self.estimate, self._noise, self.settings, report, self.process)
        return self._picture(x0).contiguous()

    def _latents(self, draft: DiffusionInput) -> Tensor:
        y_hat, own = draft.latents.y_hat, self.config.latents
        if not draft.shown:
            return y_hat.new_zeros(1, own, *y_hat.shape[2:])
        if y_hat.shape[1] != own:
            raise ValueError(f"latents of {y_hat.shape[1]} channels; the network reads {own}")
        return y_hat

    def _noise(self, draw: int) -> Tensor:
        alone = (noise.normals(s, draw, self.shape, device=self.device) for s in self.seeds)
        return torch.cat(list(alone))

    def estimate(self, x_t: Tensor, t: float, a: float) -> Estimate:
        out = self._network(x_t, t, self.maps)
        e = self._parts(out, x_t, a)
        if self.weak is None:
            return e
        weak = self._parts(self._network(x_t, t, self.weak), x_t, a)
        w = self.settings.guidance
        return Estimate(torch.lerp(weak.x0, e.x0, w), torch.lerp(weak.eps, e.eps, w), e.fraction)

    def _parts(self, out: Tensor, x_t: Tensor, a: float) -> Estimate:
        if self.config.prediction == "v":
            return Estimate(schedule.x0_from_v(x_t, out, a), schedule.eps_from_v(x_t, out, a))
        # as the paper's code does: x0 is clipped to the pictures' range, and eps follows it
        x0 = schedule.x0_from_eps(x_t, out[:, :3], a).clamp(-1, 1)
        fraction = (out[:, 3:] + 1) / 2 if self.config.learned_variance else None
        return Estimate(x0, schedule.eps_from_x0(x_t, x0, a), fraction)

    def _network(self, x_t: Tensor, t: float, maps: Maps) -> Tensor:
        now = torch.full_like(self.beta, t)
        out: Tensor | None = None
        for w in self._windows(self.overlap):
            (part,) = tiles.cut(w, [x_t], [1])
            near = tiles.cut(w, maps, self.config.map_strides)
            with self._precision():
                made: Tensor = self.net.denoiser(part, now, near, self.quality, self.beta)
            if out is None:
                out = x_t.new_empty(len(x_t), made.shape[1], *x_t.shape[2:])
            out[w.writes(STRIDE_Y)] = made[w.within(STRIDE_Y)]
            self.on_tile()
        assert out is not None
        return out

    def _maps(self, given: Condition) -> Maps:
        rows, columns = given.y_hat.shape[2:]
        strides = self.config.map_strides
        maps: list[Tensor] = []
        for w in self._windows(CONDITION_OVERLAP):
            x_hat, y_hat, bits = tiles.cut(
                w, [given.x_hat, given.y_hat, given.bits], [1, STRIDE_Y, STRIDE_Y]
            )
            near = replace(given, x_hat=x_hat, y_hat=y_hat, bits=bits)
            with self._precision():
                made: Maps = self.net.conditioner(near)
            if not maps:
                maps = [
                    m.new_empty(len(m), m.shape[1], rows * STRIDE_Y // s, columns * STRIDE_Y // s)
                    for m, s in zip(made, strides, strict=True)
                ]
            for m, part, s in zip(maps, made, strides, strict=True):
                m[w.writes(STRIDE_Y // s)] = part[w.within(STRIDE_Y // s)]
            self.on_tile()
        return tuple(maps)

    def _windows(self, overlap: int) -> list[tiles.Window]:
        rows, columns = self.shape[1] // STRIDE_Y, self.shape[2] // STRIDE_Y
        together = 1 if self.device.type == "cuda" else len(self.seeds)  # a CPU's cache is small
        area = max(self.window // together, LEAST_WINDOW)
        return list(tiles.windows(rows, columns, area, overlap))

    def _precision(self) -> torch.autocast:
        """bfloat16 on a GPU, for the networks alone: x_t and what is added to it stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def _picture(self, x0: Tensor) -> Tensor:
        if self.config.target == "image":
            return ((x0 + 1) / 2).clamp(0, 1)
        return (self.x_hat + self.scale * high_pass(x0)).clamp(0, 1)

    def _scales(self) -> Tensor:
        return self.net.scales[self.quality][:, None, None, None]


def load(folder: Path = checkpoint.WEIGHTS, device: torch.device | None = None) -> Decoder:
    """The shipped decoder; `WeightsError` where the manifest names none or it is altered."""
    for entry in checkpoint.manifest(folder):
        if entry.kind == "decoder":
            tensors, metadata = checkpoint.load_with_metadata(entry, folder)
            net = _network(tensors, metadata, folder / entry.file)
            return Decoder(entry.weights_id, net, device, _codecs(metadata))
    raise WeightsError(f"{folder}: the manifest names no diffusion decoder")


def opened(file: Path, device: torch.device | None = None) -> Decoder:
    """The decoder in a training run's file; `WeightsError` where it holds something else."""
    tensors, metadata = checkpoint.read(file)
    net = _network(tensors, metadata, file)
    return Decoder(checkpoint.weights_id(tensors), net, device, _codecs(metadata))


def _codecs(metadata: dict[str, str]) -> frozenset[str] | None:
    ids = metadata.get(checkpoint.CODECS)
    return None if ids is None else frozenset(json.loads(ids))


def _network(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> UNet:
    try:
        net = UNet(presets.from_json(metadata["config"]))
        net.load_state_dict({k: v.float() for k, v in tensors.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise WeightsError(f"{file}: no diffusion decoder: {e}") from e
    return net
