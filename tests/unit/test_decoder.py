"""The network and the decoder around it, on tiny weights."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import bitstream, checkpoint, decoder
from models.codec import Codec
from models.decoder import Decoder
from models.errors import Canceled, WeightsError
from models.hyperprior import Latents
from models.tiers import Settings
from models.unet import UNet, UNetConfig, high_pass

FAST = Settings("ddim", 2)


def random_maps(net: UNet, size: int) -> tuple[Tensor, ...]:
    strides = zip(net.config.widths, (4, 8, 16), strict=True)
    return tuple(torch.randn(1, w, size // s, size // s) for w, s in strides)


@pytest.fixture(scope="module")
def decoded(shipped: Codec, small_msh: bytes) -> tuple[Latents, Tensor]:
    latents = shipped.latents(bitstream.parse(small_msh))
    return latents, shipped.synthesis(latents.y_hat)


def test_the_same_seed_gives_the_same_pixels(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    a, b, c = (tiny_decoder.sample(*decoded, 2, FAST, seed) for seed in (1, 1, 2))
    assert a.shape == decoded[1].shape
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_pixels_stay_within_0_and_1(tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]) -> None:
    x = tiny_decoder.sample(*decoded, 2, FAST, 0)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


def test_colours_do_not_shift(tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]) -> None:
    """Not even a network that wants it can move the mean: the lowest band stays the codec's."""
    net = copy.deepcopy(tiny_decoder.net)
    with torch.no_grad():
        net.denoiser.outward.bias.fill_(3.0)
    x = Decoder("0" * 16, net).sample(*decoded, 2, FAST, 0)
    shift = (x - decoded[1]).mean((2, 3)).abs() * 255
    assert float(shift.max()) < 0.5


def test_the_picture_depends_on_the_latents(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    latents, x_hat = decoded
    other = Latents(latents.y_hat.flip(3), latents.symbols, latents.bits)
    a = tiny_decoder.sample(latents, x_hat, 2, FAST, 0)
    b = tiny_decoder.sample(other, x_hat, 2, FAST, 0)
    assert not torch.equal(a, b)


def test_progress_shows_pictures_and_may_cancel(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    seen: list[tuple[int, int]] = []

    def on_step(step: int, steps: int, picture: Callable[[], Tensor]) -> None:
        assert picture().shape == decoded[1].shape
        seen.append((step, steps))
        raise Canceled("enough")

    with pytest.raises(Canceled):
        tiny_decoder.sample(*decoded, 2, FAST, 0, on_step)
    assert seen == [(1, 2)]


def test_the_high_pass_leaves_no_mean_and_keeps_detail() -> None:
    flat = torch.full((1, 3, 64, 64), 0.7)
    assert torch.allclose(high_pass(flat), torch.zeros_like(flat), atol=1e-5)
    texture = torch.sin(torch.arange(64.0) * torch.pi / 2).expand(1, 3, 64, 64)
    assert torch.allclose(high_pass(texture), texture, atol=1e-5)


def test_a_pixel_depends_on_the_halo_only(tiny_decoder: Decoder) -> None:
    net = tiny_decoder.net
    halo = net.config.halo
    assert halo <= 96
    size = 320
    one = torch.ones(1)
    maps = random_maps(net, size)
    x = torch.randn(1, 3, size, size)
    changed = x.clone()
    changed[:, :, :, 160:] += 1

    def run(x_t: Tensor) -> Tensor:
        with torch.inference_mode():
            v: Tensor = net.denoiser(x_t, one * 0.5, maps, torch.tensor([2]), one)
        return v

    difference = (run(x) - run(changed)).abs().amax((0, 1, 2))
    reached = difference.nonzero().min()
    # positions are grouped by 16, the coarsest stride
    assert 160 - halo - 16 <= int(reached) < 160


def test_weights_come_back_from_their_file(tmp_path: Path, tiny_decoder: Decoder) -> None:
    import hashlib

    tensors = {k: v.half() for k, v in tiny_decoder.net.state_dict().items()}
    file = tmp_path / "tiny.safetensors"
    save_file(tensors, file, {"config": json.dumps(asdict(tiny_decoder.net.config))})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "manifest.toml").write_text(
        f'[[weights]]\nkind = "decoder"\nname = "tiny"\nfile = "{file.name}"\nsha256 = "{digest}"\n'
        f'weights_id = "{checkpoint.weights_id(tensors)}"\n'
    )
    loaded = decoder.load(tmp_path)
    assert loaded.weights_id == checkpoint.weights_id(tensors)
    assert loaded.net.config == tiny_decoder.net.config
    (tmp_path / "manifest.toml").write_text("weights = []\n")
    with pytest.raises(WeightsError, match="no diffusion decoder"):
        decoder.load(tmp_path)


def test_the_compact_network_stays_within_its_budget() -> None:
    """At most 150 kMAC a pixel and step (the design's bound), counted over the convolutions."""
    net = UNet(UNetConfig()).eval()
    macs = 0

    def count(module: torch.nn.Conv2d, _inputs: object, out: Tensor) -> None:
        nonlocal macs
        macs += out[0].numel() * module.weight[0].numel()

    for m in net.denoiser.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(count)
    size = 64
    maps = random_maps(net, size)
    with torch.inference_mode():
        net.denoiser(
            torch.zeros(1, 3, size, size), torch.ones(1), maps, torch.tensor([2]), torch.zeros(1)
        )
    assert macs / size**2 <= 150_000
