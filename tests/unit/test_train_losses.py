"""Losses of the diffusion decoder, compared with known values."""

import math
import random
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models import image
from models.diffusion import schedule
from models.diffusion.sampler import DenoiserOutput, sample
from models.errors import WeightsError
from models.evaluate import niqe
from models.tiers import Settings
from models.train import losses
from models.train.bank import Batch
from models.train.config import Stage
from models.train.decoder_config import DiffusionConfig
from models.train.lpips import LpipsLoss
from models.train.perceptual import PerceptualLoss
from models.train.task import TrainingStep

PHOTO = Path(__file__).parents[1] / "data" / "kodim23.png"


def test_the_reported_loss_of_predicting_zero_is_correct() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 8, 3, 16, 16, generator=g)
    loss, zero = losses.denoising(lambda x, t: x * 0, x0, losses.stratified(8, g), eps)
    assert float(loss) == pytest.approx(float(zero))
    t = torch.tensor([0.0, 1.0, 0.5])
    alpha, sigma = schedule.alpha_sigma(t)
    exact, _ = losses.denoising(lambda x, t: alpha * eps[:3] - sigma * x0[:3], x0[:3], t, eps[:3])
    assert float(exact) == 0


def test_no_time_is_rounded_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    t = losses.stratified(224, torch.Generator().manual_seed(0))
    assert float(t.max()) < 1
    assert int((t * 4000).long().max()) == 3999  # the last of the paper's steps


def test_times_are_stratified() -> None:
    t = losses.stratified(16, torch.Generator().manual_seed(0))
    assert sorted((t * 16).long().tolist()) == list(range(16))
    assert not torch.equal(t, t.sort().values)


def test_middle_times_cover_all_times_with_three_quarters_in_the_middle() -> None:
    u = torch.arange(1000) / 1000
    t = losses.middle(u)
    assert float(t[0]) == 0 and 0.99 < float(t[-1]) < 1
    assert (t.diff() > 0).all()
    assert float(((t >= 0.1) & (t < 0.7)).float().mean()) == pytest.approx(0.75, abs=0.002)


def test_a_rollout_with_exact_predictions_ends_at_x0() -> None:
    x0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def exact(x_t: Tensor, t: Tensor) -> Tensor:
        a = schedule.alpha_bar(float(t[0]))
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return math.sqrt(a) * eps - math.sqrt(1 - a) * x0

    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for calls in (1, 4):
        steps = schedule.Continuous().steps(calls)
        assert torch.equal(losses.rollout(exact, noise, []), noise)
        reached = losses.rollout(exact, noise, steps)
        torch.testing.assert_close(reached, x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("calls", "times"), [(1, [1.0]), (4, [1.0, 0.75, 0.5, 0.25])])
def test_training_calls_the_denoiser_as_the_sampler_does(calls: int, times: list[float]) -> None:
    """At the same times, and with the same result."""
    called: list[float] = []
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def in_training(x_t: Tensor, t: Tensor) -> Tensor:
        called.append(float(t[0]))
        return 0.3 * x_t.tanh()

    def in_the_sampler(x_t: Tensor, t: float, a: float) -> DenoiserOutput:
        v = in_training(x_t, torch.tensor([t]))
        return DenoiserOutput(schedule.x0_from_v(x_t, v, a), schedule.eps_from_v(x_t, v, a))

    trained = losses.rollout(in_training, noise, schedule.Continuous().steps(calls))
    sampled = sample(in_the_sampler, lambda draw: noise, Settings("ddim", calls, beta=1))
    assert called == times * 2
    torch.testing.assert_close(trained, sampled)


def test_noise_of_the_same_spectrum_has_another_sparsity_than_edges() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2, 1, 1, 128, 128, generator=generator)
    grain, other = 0.5 + noise.expand(2, 1, 3, 128, 128)
    points = torch.rand(1, 1, 128, 128, generator=generator) < 0.01  # as much power, in few places
    sparse = 0.5 + points.float().expand(1, 3, 128, 128)
    assert float(losses.sparsity(grain, grain)) == 0
    assert losses.spectrum(sparse, grain) < 0.3
    assert losses.sparsity(sparse, grain) > 5 * losses.sparsity(other, grain)
    assert losses.sparsity(sparse, grain) == losses.sparsity(grain, sparse)  # symmetric


def test_a_mirrored_texture_has_the_same_spectrum_and_other_scene_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    texture, other = torch.randn(2, 1, 1, 160, 160, generator=generator)
    streaks = torch.eye(9)[None, None] / 9  # falling to the right
    texture, other = (
        0.5 + 0.2 * F.conv2d(x, streaks).expand(1, 3, -1, -1) for x in (texture, other)
    )
    mirrored = texture.flip(3)
    assert float(losses.scene_statistics(texture, texture)) == 0
    assert losses.spectrum(mirrored, texture) < 1.2 * losses.spectrum(other, texture)
    distance = losses.scene_statistics(mirrored, texture)
    assert distance > 5 * losses.scene_statistics(other, texture)
    torch.testing.assert_close(distance, losses.scene_statistics(texture, mirrored))
    flat = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    losses.scene_statistics(flat, texture[..., :64, :64]).backward()  # type: ignore[no-untyped-call]
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_scene_statistics_are_the_moments_of_niqe() -> None:
    pixels = image.read(PHOTO.read_bytes(), 1 << 20)
    normal = niqe._mscn(niqe._luma(pixels))[3:-3, 3:-3]  # without mirrored borders
    torch_luma = torch.from_numpy(niqe._luma(pixels)).float()[None, None]
    got = losses._scene_moments(torch_luma)[0]
    falling = normal[:-1, :-1] * normal[1:, 1:]
    expected = {
        0: (normal**2).mean(),
        1: abs(normal).mean() ** 2 / (normal**2).mean(),
        4: abs(falling).mean() ** 2 / (falling**2).mean(),
        10: (np.minimum(falling, 0) ** 2).mean(),
    }
    for i, value in expected.items():
        assert float(got[i]) == pytest.approx(value, rel=0.02)


def test_colour_noise_changes_the_chroma_spectrum_more_than_luma_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    grain = 0.05 * torch.randn(2, 1, 1, 128, 128, generator=generator)
    grey = (0.5 + grain[0]).expand(1, 3, 128, 128)
    colour = grey + grain[1] * torch.tensor([-0.5, 0.36, -0.59])[:, None, None]  # luma: about 0
    assert float(losses.chroma_spectrum(grey, grey)) == 0
    assert losses.spectrum(colour, grey) < 0.05
    assert losses.chroma_spectrum(colour, grey) > 1
    assert losses.chroma_spectrum(grey + 0.05, grey) < 0.01


def test_the_period_is_the_share_of_the_error_that_repeats_with_the_stride_of_the_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 128, 128, generator=generator)
    noise, motif = torch.randn(2, 1, 3, 128, 128, generator=generator)
    motif = motif[..., :16, :16].repeat(1, 1, 8, 8)
    assert float(losses.period(x, x)) == 0
    assert losses.period(x + 0.1 * noise, x) == pytest.approx(1 / 64, rel=0.1)
    assert losses.period(x + 0.1 * motif, x) == pytest.approx(1, rel=0.01)
    assert losses.period(x + 0.1 * (motif + noise), x) == pytest.approx(0.5, rel=0.1)
    assert float(losses.period(x + 0.1, x)) < 1e-6  # brightness is no pattern
    shifted = (x + 0.1 * motif)[..., 3:, 1:], x[..., 3:, 1:]
    assert losses.period(*shifted) == pytest.approx(1, rel=0.01)


def test_lpips_sees_pictures_at_every_offset_to_its_stride_and_mirrored() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    config = DiffusionConfig(out="", spectrum=0)
    seen = set()

    def first_pixels(picture: Tensor, original: Tensor) -> Tensor:
        assert torch.equal(picture, original)
        seen.add((float(picture[0, 0, 0, 0]), float(picture[0, 0, 0, -1])))
        return picture

    loss = PerceptualLoss(config, cast(LpipsLoss, first_pixels), 1, x.device)
    batch = Batch(x, x, x, x, x)
    step = TrainingStep(Stage("perceptual"), 0, 0.0, torch.Generator(), random.Random(0))
    for _ in range(200):
        assert [name for name, _, _ in loss.terms(x, batch, step)] == ["lpips"]
    rows = [(8.0 * top + left, 8.0 * top + 7) for top in range(4) for left in range(4)]
    assert seen == {*rows, *((last, first) for first, last in rows)}


def test_the_spectrum_distance_ignores_where_texture_is_and_penalises_hatching() -> None:
    g = torch.Generator().manual_seed(0)
    grain, other = 0.5 + 0.1 * torch.randn(2, 2, 1, 64, 64, generator=g).expand(-1, -1, 3, -1, -1)
    smooth = F.avg_pool2d(grain, 3, 1, 1)
    assert float(losses.spectrum(grain, grain)) == 0
    assert losses.spectrum(other, grain) < 0.2 * losses.spectrum(smooth, grain)
    assert losses.spectrum(grain, smooth) == losses.spectrum(smooth, grain)  # symmetric
    flat = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    hatching = 0.02 * torch.tensor([1.0, -1, -1, 1]).repeat(16)
    assert losses.spectrum(flat + hatching, flat) > 5 * losses.spectrum(flat + 0.02, flat)
    assert losses.spectrum(flat + hatching, flat) > 0.02
    losses.spectrum(flat, flat.detach() + 1e-3).backward()  # type: ignore[no-untyped-call]
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_the_papers_vlb_is_zero_for_the_truth_and_trains_only_the_variance() -> None:
    g = torch.Generator().manual_seed(0)
    hybrid = losses.Hybrid(torch.device("cpu"))
    x = torch.rand(4, 3, 8, 8, generator=g) * 2 - 1
    eps = torch.randn(x.shape, generator=g)
    index = torch.tensor([1, 50, 1000, 3000])
    true = torch.cat([eps, torch.full_like(eps, -1.0)], 1)  # the posterior's variance
    terms = hybrid(lambda x_t, t: true, x, index, eps)
    assert float(terms.simple) == 0
    assert float(terms.vlb) == pytest.approx(0, abs=2e-2)  # bits of 4000 steps
    torch.testing.assert_close(terms.x0, x, atol=2e-3, rtol=0)

    out = torch.zeros(4, 6, 8, 8).requires_grad_()
    hybrid(lambda x_t, t: out, x, index, eps).vlb.backward()  # type: ignore[no-untyped-call]
    assert out.grad is not None
    assert not out.grad[:, :3].any()
    assert out.grad[:, 3:].any()


def test_the_papers_first_step_is_a_likelihood() -> None:
    hybrid = losses.Hybrid(torch.device("cpu"))
    x = torch.full((1, 3, 4, 4), 0.2)
    eps = torch.zeros_like(x)
    true = torch.cat([eps, -torch.ones_like(eps)], 1)
    wrong = torch.cat([eps + 1, -torch.ones_like(eps)], 1)
    index = torch.zeros(1, dtype=torch.int64)
    near, far = (float(hybrid(lambda *_, o=o: o, x, index, eps).vlb) for o in (true, wrong))
    assert 0 <= near < far < math.inf


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_equals_the_lpips_package(name: str, photo: image.Pixels, tmp_path: Path) -> None:
    import lpips

    torch.manual_seed(0)
    net = lpips.LPIPS(net=name, pnet_rand=True, pretrained=False, verbose=False).eval()
    with torch.no_grad():
        for layer in net.lins:
            for weight in layer.parameters():
                weight.abs_()
    state = {k: v.contiguous() for k, v in net.state_dict().items() if not k.startswith("lins.")}
    save_file(state, tmp_path / "lpips.safetensors")
    a = torch.from_numpy(photo[:96, :96].copy()).permute(2, 0, 1)[None].float() / 255
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.no_grad():
        expected = float(net(a, b, normalize=True))
    assert float(LpipsLoss(tmp_path / "lpips.safetensors")(a, b)) == pytest.approx(
        expected, rel=1e-3
    )
    assert expected > 0


def test_a_file_without_lpips_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no LPIPS weights"):
        LpipsLoss(tmp_path / "other.safetensors")
