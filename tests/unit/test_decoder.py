"""The diffusion decoder, mostly with a tiny network."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint, image, processor, tiles
from models.codec import bitstream, codec
from models.codec.codec import Codec
from models.codec.hyperprior import Latents
from models.diffusion import decoder
from models.diffusion.decoder import Decoder, DiffusionInput
from models.diffusion.presets import PAPER
from models.diffusion.unet import UNet
from models.errors import Canceled, ParameterError, WeightsError, WrongWeights
from models.tiers import Settings, decoder_for

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


@pytest.mark.parametrize(
    ("variable", "flags", "bf16"),
    [
        ("auto", "avx512f avx512_bf16", True), ("", "avx2 amx_bf16", True),
        ("auto", "avx2 avx512f", False), ("f32", "avx512_bf16", False), ("bf16", "avx2", True),
    ],
)  # fmt: skip
def test_a_cpu_with_instructions_for_bfloat16_uses_them_by_default(
    variable: str, flags: str, bf16: bool, tiny_decoder: Decoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("AFTERIMAGE_DIFFUSION_PRECISION", variable)
    processor.has_bfloat16.cache_clear()
    try:
        assert Decoder("0" * 16, copy.deepcopy(tiny_decoder.net)).bf16 is bf16
    finally:
        processor.has_bfloat16.cache_clear()


def test_an_unknown_precision_is_refused(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_DIFFUSION_PRECISION", "float32")
    with pytest.raises(ParameterError, match="=float32: choose auto, bf16, f32"):
        Decoder("0" * 16, copy.deepcopy(tiny_decoder.net))


def test_a_system_that_does_not_describe_its_cpu_uses_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert processor.has_bfloat16.__wrapped__() is False


@pytest.mark.weights
def test_a_picture_drawn_in_bfloat16_is_close_to_that_in_float32(
    decoded: tuple[Latents, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    for precision in ("f32", "bf16"):
        monkeypatch.setenv("AFTERIMAGE_DIFFUSION_PRECISION", precision)
        one_step = decoder.load_all()[1]
        pictures.append(one_step.sample(*decoded, 2, Settings("ddim", 1, beta=1), 0))
    difference = (pictures[0] - pictures[1]).abs() * 255
    assert 0 < float(difference.mean()) < 0.5


def test_pixels_are_between_0_and_1(tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]) -> None:
    x = tiny_decoder.sample(*decoded, 2, FAST, 0)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


def test_colours_do_not_shift(tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]) -> None:
    """A network with a constant output cannot move the mean: the lowest band is the codec's."""
    net = copy.deepcopy(tiny_decoder.net)
    with torch.no_grad():
        net.denoiser.get_parameter("outward.bias").fill_(3.0)
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


def test_on_step_gets_previews_and_may_cancel(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    calls: list[tuple[int, int]] = []

    def on_step(step: int, steps: int, preview: Callable[[], Tensor]) -> None:
        assert preview().shape == decoded[1].shape
        calls.append((step, steps))
        raise Canceled("enough")

    with pytest.raises(Canceled):
        tiny_decoder.sample(*decoded, 2, FAST, 0, on_step)
    assert calls == [(1, 2)]


def test_a_batch_gives_the_same_pictures_as_single_calls(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    latents, x_hat = decoded
    flipped = Latents(latents.y_hat.flip(3), latents.symbols, latents.bits[:, ::-1].copy())
    settings = Settings("ddpm", 3)
    inputs = [DiffusionInput(latents, x_hat, 2, 5), DiffusionInput(flipped, x_hat.flip(3), 1, 6)]
    together = tiny_decoder.sample_batch(inputs, settings)
    for i, item in enumerate(inputs):
        alone = tiny_decoder.sample(item.latents, item.x_hat, item.quality, settings, item.seed)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        other = DiffusionInput(latents, x_hat[:, :, :64], 2, 5)
        tiny_decoder.sample_batch([inputs[0], other], settings)


def test_guidance_extrapolates_from_hidden_to_visible_latents(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    latents, x_hat = decoded
    other = Latents(latents.y_hat.flip(3), latents.symbols, latents.bits)

    def draw(latents: Latents, guidance: float) -> Tensor:
        settings = Settings("ddim", 1, guidance=guidance)
        return tiny_decoder.sample(latents, x_hat, 2, settings, 0)

    blind, plain, strong = draw(latents, 0), draw(latents, 1), draw(latents, 2)
    assert torch.equal(blind, draw(other, 0))
    assert not torch.equal(blind, plain)
    inside = torch.stack([(x > 0) & (x < 1) for x in (blind, plain, strong)]).all(0)
    assert torch.allclose((2 * plain - blind)[inside], strong[inside], atol=1e-5)


def test_latents_of_other_codecs_are_hidden(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    """With hidden latents the picture depends only on x_hat and the bit map, as at guidance 0."""
    latents, x_hat = decoded
    wider = Latents(torch.randn(1, 320, *latents.y_hat.shape[2:]), latents.symbols, latents.bits)
    hidden, other = (
        tiny_decoder.sample(y, x_hat, 2, FAST, 0, latents_visible=False) for y in (latents, wider)
    )
    assert torch.equal(hidden, other)
    assert not torch.equal(hidden, tiny_decoder.sample(latents, x_hat, 2, FAST, 0))
    unguided, guided = replace(FAST, guidance=0.0), replace(FAST, guidance=2.0)
    assert torch.equal(hidden, tiny_decoder.sample(latents, x_hat, 2, unguided, 0))
    still_hidden = tiny_decoder.sample(wider, x_hat, 2, guided, 0, latents_visible=False)
    assert torch.equal(hidden, still_hidden)
    with pytest.raises(ValueError, match="320 channels"):
        tiny_decoder.sample(wider, x_hat, 2, FAST, 0)


def test_latents_may_be_visible_and_hidden_in_one_batch(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    visible = DiffusionInput(*decoded, 2, 5)
    inputs = [visible, replace(visible, latents_visible=False)]
    settings = Settings("ddim", 2, guidance=1.5)
    together = tiny_decoder.sample_batch(inputs, settings)
    for i, item in enumerate(inputs):
        alone = tiny_decoder.sample_batch([item], settings)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


def test_settings_may_be_integers(tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]) -> None:
    integers = Settings("ddim", 3, eta=1, gamma=1, beta=1, guidance=2)
    numbers = Settings("ddim", 3, eta=1.0, gamma=1.0, beta=1.0, guidance=2.0)
    assert str(integers) == str(numbers)
    a, b = (tiny_decoder.sample(*decoded, 2, settings, 0) for settings in (integers, numbers))
    assert torch.equal(a, b)


def test_an_untrained_quality_is_replaced_by_the_nearest_trained_one(
    tiny_decoder: Decoder, decoded: tuple[Latents, Tensor]
) -> None:
    net = copy.deepcopy(tiny_decoder.net)
    net.scales.fill_(1)
    net.scales[2:4] = torch.tensor([0.03, 0.02])
    partly_trained = Decoder("0" * 16, net)
    assert [partly_trained.nearest_quality(q) for q in range(1, 9)] == [2, 2, 3, 3, 3, 3, 3, 3]
    at_2, at_3, at_8 = (partly_trained.sample(*decoded, q, FAST, 0) for q in (2, 3, 8))
    assert torch.equal(at_8, at_3)
    assert not torch.equal(at_2, at_3)


@pytest.mark.weights
def test_the_shipped_decoders_know_the_shipped_qualities_and_that_of_one_step_all_others() -> None:
    general, one_step = (decoder.load_all()[steps] for steps in (0, 1))
    assert [general.nearest_quality(q) for q in range(1, 9)] == [1, 2, 3, 3, 3, 3, 3, 3]
    assert [one_step.nearest_quality(q) for q in range(1, 9)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_windows_give_the_same_picture_as_one_call(
    tiny_decoder: Decoder,
    shipped: Codec,
    photo: image.Pixels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal up to rounding if the overlap covers the network's whole receptive field."""
    x = codec.to_tensor(photo[:256, :384].copy())
    latents = shipped.latents(shipped.encode(x, "msh", "exact"))
    x_hat = shipped.synthesis(latents.y_hat)
    whole = tiny_decoder.sample(latents, x_hat, 2, Settings("ddpm", 3), 0)
    monkeypatch.setattr(decoder, "OVERLAP", 6)
    monkeypatch.setattr(decoder, "LEAST_WINDOW", 320)
    assert len(list(tiles.windows(16, 24, 320, 6))) > 1
    item = DiffusionInput(latents, x_hat, 2, 0)
    tiled = tiny_decoder.sample_batch([item], Settings("ddpm", 3), window=320)
    assert not torch.equal(whole, tiled)
    assert torch.allclose(whole, tiled, atol=1e-5)


def test_a_large_batch_is_not_cut_below_the_smallest_window(
    tiny_decoder: Decoder, shipped: Codec, photo: image.Pixels
) -> None:
    x = codec.to_tensor(photo[:320, :384].copy())
    latents = shipped.latents(shipped.encode(x, "msh", "exact"))
    x_hat, calls = shipped.synthesis(latents.y_hat), []
    inputs = [DiffusionInput(latents, x_hat, 2, seed) for seed in range(8)]
    tiny_decoder.sample_batch(
        inputs, Settings("ddim", 2), on_window=lambda: calls.append(1), window=800
    )
    assert len(calls) == 3  # one window each for the feature maps and for two steps


@pytest.mark.weights
@pytest.mark.parametrize("settings", [Settings("ddim", 1, beta=1.0), Settings("ddpm", 4)], ids=str)
def test_windows_of_the_shipped_weights_leave_no_seams(
    shipped: Codec, photo: image.Pixels, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_WINDOW", 16 * 19)
    x = codec.to_tensor(photo[:256, :512].copy())
    latents = shipped.latents(shipped.encode(x, "msh", "exact"))
    x_hat = shipped.synthesis(latents.y_hat)
    shipped_decoder = decoder_for(decoder.load_all(), settings)
    whole = shipped_decoder.sample(latents, x_hat, 2, settings, 0)
    seams = [w.kept[2] * 16 for w in tiles.windows(16, 32, 16 * 19, decoder.OVERLAP) if w.kept[2]]
    assert seams
    item = DiffusionInput(latents, x_hat, 2, 0)
    tiled = shipped_decoder.sample_batch([item], settings, window=16 * 19)
    assert not torch.equal(whole, tiled)
    assert float((tiled - whole).abs().max()) * 255 < 0.1

    def contrast_at_seams(x: Tensor) -> float:
        return sum(float((x[:, :, :, s] - x[:, :, :, s - 1]).abs().mean()) for s in seams)

    assert contrast_at_seams(tiled) / contrast_at_seams(whole) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("settings", [Settings("ddim", 3), Settings("ddpm", 3)], ids=str)
def test_the_papers_network_draws_pictures(
    decoded: tuple[Latents, Tensor], settings: Settings
) -> None:
    torch.manual_seed(0)
    small = replace(
        PAPER, widths=(32, 32, 32, 32, 32), condition=(32, 32, 32, 32), embedding=32,
        down=(1, 1, 1, 1, 1), up=(2, 2, 2, 2, 2),
    )  # fmt: skip
    paper = Decoder("1" * 16, UNet(small))
    with torch.no_grad():
        for p in paper.net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    a, b = (paper.sample(*decoded, 2, settings, seed) for seed in (0, 1))
    assert a.shape == decoded[1].shape
    assert 0 <= float(a.min()) < float(a.max()) <= 1
    assert not torch.equal(a, b)
    with pytest.raises(WrongWeights, match="needs latents of the codec"):
        paper.sample(*decoded, 2, settings, 0, latents_visible=False)
    with pytest.raises(WrongWeights, match="needs latents of the codec"):
        paper.denoiser(DiffusionInput(*decoded, 2, 0, latents_visible=False))


def test_the_decoder_is_loaded_by_the_manifest(tmp_path: Path, tiny_decoder: Decoder) -> None:
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
    with pytest.raises(WeightsError, match="names no general diffusion decoder"):
        decoder.load(tmp_path)
