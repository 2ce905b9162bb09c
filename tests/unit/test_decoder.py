"""The network and the decoder around it, on tiny weights."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint, image, tiles
from models.codec import bitstream, codec
from models.codec.codec import Codec
from models.codec.hyperprior import Latents
from models.diffusion import decoder
from models.diffusion.decoder import Decoder, DiffusionInput
from models.diffusion.presets import PAPER
from models.diffusion.unet import UNet
from models.errors import Canceled, WeightsError, WrongWeights
from models.tiers import Settings

FAST = Settings("ddim", 2)


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


def test_a_batch_gives_the_pictures_that_each_request_gives_alone(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    latents, x_hat = decoded
    flipped = Latents(latents.y_hat.flip(3), latents.symbols, latents.bits[:, ::-1].copy())
    settings = Settings("ddpm", 3)
    drafts = [DiffusionInput(latents, x_hat, 2, 5), DiffusionInput(flipped, x_hat.flip(3), 1, 6)]
    together = tiny_decoder.sample_batch(drafts, settings)
    for i, d in enumerate(drafts):
        alone = tiny_decoder.sample(d.latents, d.x_hat, d.quality, settings, d.seed)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        other = DiffusionInput(latents, x_hat[:, :, :64], 2, 5)
        tiny_decoder.sample_batch([drafts[0], other], settings)


def test_guidance_goes_from_the_picture_without_latents_to_the_one_with_them(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    latents, x_hat = decoded
    other = Latents(latents.y_hat.flip(3), latents.symbols, latents.bits)

    def draw(given: Latents, guidance: float) -> Tensor:
        settings = Settings("ddim", 1, guidance=guidance)
        return tiny_decoder.sample(given, x_hat, 2, settings, 0)

    blind, plain, strong = draw(latents, 0), draw(latents, 1), draw(latents, 2)
    assert torch.equal(blind, draw(other, 0))
    assert not torch.equal(blind, plain)
    inside = torch.stack([(x > 0) & (x < 1) for x in (blind, plain, strong)]).all(0)
    assert torch.allclose((2 * plain - blind)[inside], strong[inside], atol=1e-5)


def test_latents_of_other_codecs_are_hidden(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    """Then the picture follows from x_hat and bit map, as without guidance's strong half."""
    latents, x_hat = decoded
    wider = Latents(torch.randn(1, 320, *latents.y_hat.shape[2:]), latents.symbols, latents.bits)
    hidden, other = (
        tiny_decoder.sample(given, x_hat, 2, FAST, 0, shown=False) for given in (latents, wider)
    )
    assert torch.equal(hidden, other)
    assert not torch.equal(hidden, tiny_decoder.sample(latents, x_hat, 2, FAST, 0))
    unguided, guided = replace(FAST, guidance=0.0), replace(FAST, guidance=2.0)
    assert torch.equal(hidden, tiny_decoder.sample(latents, x_hat, 2, unguided, 0))
    assert torch.equal(hidden, tiny_decoder.sample(wider, x_hat, 2, guided, 0, shown=False))
    with pytest.raises(ValueError, match="320 channels"):
        tiny_decoder.sample(wider, x_hat, 2, FAST, 0)


def test_a_batch_may_show_some_latents_and_hide_others(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    drafts = [DiffusionInput(*decoded, 2, 5), DiffusionInput(*decoded, 2, 5, shown=False)]
    settings = Settings("ddim", 2, guidance=1.5)
    together = tiny_decoder.sample_batch(drafts, settings)
    for i, d in enumerate(drafts):
        alone = tiny_decoder.sample_batch([d], settings)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


def test_a_quality_that_was_not_trained_is_drawn_as_the_nearest(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    net = copy.deepcopy(tiny_decoder.net)
    net.scales.fill_(1)
    net.scales[2:4] = torch.tensor([0.03, 0.02])
    own = Decoder("0" * 16, net)
    assert [own.nearest(q) for q in range(1, 9)] == [2, 2, 3, 3, 3, 3, 3, 3]
    assert torch.equal(own.sample(*decoded, 8, FAST, 0), own.sample(*decoded, 3, FAST, 0))
    assert not torch.equal(own.sample(*decoded, 2, FAST, 0), own.sample(*decoded, 3, FAST, 0))


@pytest.mark.weights
def test_the_shipped_decoder_was_trained_with_the_shipped_qualities() -> None:
    own = decoder.load()
    assert [own.nearest(q) for q in range(1, 9)] == [1, 2, 3, 3, 3, 3, 3, 3]


def test_a_picture_in_windows_is_the_whole_picture(
    tiny_decoder: Decoder,
    shipped: Codec,
    photo: image.Pixels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the network's whole reach as overlap, to rounding; noise and latents follow."""
    shown = codec.to_tensor(photo[:256, :384].copy())
    latents = shipped.latents(shipped.encode(shown, "msh", "exact"))
    x_hat = shipped.synthesis(latents.y_hat)
    whole = tiny_decoder.sample(latents, x_hat, 2, Settings("ddpm", 3), 0)
    monkeypatch.setattr(decoder, "OVERLAP", 6)
    monkeypatch.setattr(decoder, "LEAST_WINDOW", 320)
    assert len(list(tiles.windows(16, 24, 320, 6))) > 1
    draft = DiffusionInput(latents, x_hat, 2, 0)
    tiled = tiny_decoder.sample_batch([draft], Settings("ddpm", 3), window=320)
    assert not torch.equal(whole, tiled)
    assert torch.allclose(whole, tiled, atol=1e-5)


def test_many_pictures_together_are_not_cut_into_windows_that_are_all_overlap(
    tiny_decoder: Decoder, shipped: Codec, photo: image.Pixels
) -> None:
    shown = codec.to_tensor(photo[:320, :384].copy())
    latents = shipped.latents(shipped.encode(shown, "msh", "exact"))
    x_hat, calls = shipped.synthesis(latents.y_hat), []
    drafts = [DiffusionInput(latents, x_hat, 2, seed) for seed in range(8)]
    tiny_decoder.sample_batch(
        drafts, Settings("ddim", 2), on_tile=lambda: calls.append(1), window=800
    )
    assert len(calls) == 3  # the condition and two steps, in one window each


@pytest.mark.weights
@pytest.mark.parametrize("settings", [Settings("ddim", 4, beta=1.0), Settings("ddpm", 4)], ids=str)
def test_windows_of_the_shipped_weights_leave_no_seams(
    shipped: Codec, photo: image.Pixels, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_WINDOW", 24 * 19)
    shown = codec.to_tensor(photo[:384, :512].copy())
    latents = shipped.latents(shipped.encode(shown, "msh", "exact"))
    x_hat = shipped.synthesis(latents.y_hat)
    own = decoder.load()
    whole = own.sample(latents, x_hat, 2, settings, 0)
    seams = [w.kept[2] * 16 for w in tiles.windows(24, 32, 24 * 19, decoder.OVERLAP) if w.kept[2]]
    assert seams
    tiled = own.sample_batch([DiffusionInput(latents, x_hat, 2, 0)], settings, window=24 * 19)
    assert not torch.equal(whole, tiled)
    assert float((tiled - whole).abs().max()) * 255 < 0.1

    def steps_across(x: Tensor) -> float:
        return sum(float((x[:, :, :, s] - x[:, :, :, s - 1]).abs().mean()) for s in seams)

    assert steps_across(tiled) / steps_across(whole) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("settings", [Settings("ddim", 3), Settings("ddpm", 3)], ids=str)
def test_the_papers_preset_draws_pictures_too(
    decoded: tuple[Latents, Tensor], settings: Settings
) -> None:
    torch.manual_seed(0)
    small = replace(
        PAPER, widths=(32, 32, 32, 32, 32), condition=(32, 32, 32, 32), embedding=32,
        down=(1, 1, 1, 1, 1), up=(2, 2, 2, 2, 2),
    )  # fmt: skip
    own = Decoder("1" * 16, UNet(small))
    with torch.no_grad():
        for p in own.net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    a, b = (own.sample(*decoded, 2, settings, seed) for seed in (0, 1))
    assert a.shape == decoded[1].shape
    assert 0 <= float(a.min()) < float(a.max()) <= 1
    assert not torch.equal(a, b)
    with pytest.raises(WrongWeights, match="latents alone"):
        own.sample(*decoded, 2, settings, 0, shown=False)


def test_weights_come_back_from_their_file(tmp_path: Path, tiny_decoder: Decoder) -> None:
    import hashlib

    tensors = {k: v.half().contiguous() for k, v in tiny_decoder.net.state_dict().items()}
    file = tmp_path / "tiny.safetensors"
    save_file(tensors, file, {"config": json.dumps(asdict(tiny_decoder.config))})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "manifest.toml").write_text(
        f'[[weights]]\nkind = "decoder"\nname = "tiny"\nfile = "{file.name}"\nsha256 = "{digest}"\n'
        f'weights_id = "{checkpoint.weights_id(tensors)}"\n'
    )
    loaded = decoder.load(tmp_path)
    assert loaded.weights_id == checkpoint.weights_id(tensors)
    assert loaded.config == tiny_decoder.config
    (tmp_path / "manifest.toml").write_text("weights = []\n")
    with pytest.raises(WeightsError, match="no diffusion decoder"):
        decoder.load(tmp_path)
