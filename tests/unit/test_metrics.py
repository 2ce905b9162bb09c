"""Metrics: each against a published value or an independent formulation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from models import image
from models.codec import codec
from models.errors import WeightsError
from models.evaluate import bootstrap, kid, metrics
from models.evaluate import nlpd as nlpd_module
from models.evaluate.dists import Dists
from models.evaluate.metrics import LpipsAlex, LpipsMetric
from models.evaluate.niqe import niqe
from models.evaluate.nlpd import nlpd

Array = NDArray[np.float64]


def noisy(pixels: image.Pixels, deviation: float) -> image.Pixels:
    noise = np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pair(photo: image.Pixels) -> tuple[Tensor, Tensor]:
    cut = photo[100:300, 200:420]
    return codec.to_tensor(cut.copy()), codec.to_tensor(noisy(cut, 12))


def test_simple_metrics_of_a_known_difference() -> None:
    a = torch.zeros(1, 3, 8, 8)
    b = a.clone()
    b[:, 1] = 0.1
    assert metrics.mse(a, b) == pytest.approx(0.01 / 3)
    assert metrics.offset(a, b) == pytest.approx(25.5)
    assert metrics.psnr(1e-3) == pytest.approx(30)
    assert metrics.psnr(0) == math.inf


def test_ms_ssim_equals_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    theirs = multiscale_structural_similarity_index_measure(*pair, data_range=1.0)
    assert metrics.ms_ssim(*pair) == pytest.approx(float(theirs), abs=2e-4)
    assert 0.5 < float(theirs) < 0.99


def test_ms_ssim_is_missing_where_five_scales_do_not_fit() -> None:
    assert metrics.ms_ssim(torch.zeros(1, 3, 160, 300), torch.zeros(1, 3, 160, 300)) is None
    assert metrics.ms_ssim(torch.zeros(1, 3, 161, 300), torch.zeros(1, 3, 161, 300)) is not None


def test_gmsd_equals_the_papers_formula(pair: tuple[Tensor, Tensor]) -> None:
    from scipy.signal import convolve2d

    def gradient(x: Tensor) -> Array:
        y = x[0].permute(1, 2, 0).double().numpy() @ np.array([0.299, 0.587, 0.114]) * 255
        y = (y[::2, ::2] + y[1::2, ::2] + y[::2, 1::2] + y[1::2, 1::2]) / 4
        prewitt = np.outer([1, 1, 1], [1, 0, -1]) / 3
        return np.hypot(convolve2d(y, prewitt, "same"), convolve2d(y, prewitt.T, "same"))

    a, b = (gradient(x) for x in pair)
    expected = ((2 * a * b + 170) / (a**2 + b**2 + 170)).std()
    assert metrics.gmsd(*pair) == pytest.approx(expected, rel=1e-3)


def test_niqe_of_kodim23_equals_that_of_the_published_code(photo: image.Pixels) -> None:
    assert niqe(photo) == pytest.approx(4.247, abs=1e-3)


def test_niqe_rises_with_strong_noise(photo: image.Pixels) -> None:
    assert niqe(noisy(photo, 10)) == pytest.approx(7.552, abs=5e-3)


def test_niqe_is_missing_without_two_blocks_that_have_texture(photo: image.Pixels) -> None:
    assert niqe(photo[:96, :191]) is None
    assert niqe(np.full((192, 192, 3), 128, np.uint8)) is None
    assert niqe(photo[:96, :192]) is not None


def slow_nlpd(a: image.Pixels, b: image.Pixels) -> float:
    """NLPD again, with two-dimensional kernels, explicit borders and index arithmetic."""
    from scipy.signal import convolve2d

    low = np.outer(nlpd_module.LOWPASS, nlpd_module.LOWPASS)

    def pyramid(pixels: image.Pixels) -> list[Array]:
        x = (pixels.astype(float) * [0.299, 0.587, 0.114]).sum(2) / 255
        out = []
        for _ in range(5):
            blurred = convolve2d(np.pad(x, 2, "symmetric"), low, "valid")
            half = blurred[0::2, 0::2]
            estimate = np.zeros_like(x)
            for i, j in np.ndindex(x.shape):
                for u in range(-2, 3):
                    for v in range(-2, 3):
                        if (i + u) % 2 == 0 and (j + v) % 2 == 0:
                            row = min(max((i + u) // 2, 0), half.shape[0] - 1)
                            column = min(max((j + v) // 2, 0), half.shape[1] - 1)
                            estimate[i, j] += 4 * low[u + 2, v + 2] * half[row, column]
            out.append(x - estimate)
            x = half
        return [*out, x]

    def divided(z: Array, scale: int) -> Array:
        weights = np.array(nlpd_module.NEIGHBOURS[scale])
        return z / (nlpd_module.SIGMAS[scale] + convolve2d(abs(z), weights, "same"))

    scales = enumerate(zip(pyramid(a), pyramid(b), strict=True))
    roots = [np.sqrt(((divided(u, k) - divided(v, k)) ** 2).mean()) for k, (u, v) in scales]
    return float(np.mean(roots))


def test_nlpd_equals_a_plain_formulation(photo: image.Pixels) -> None:
    cut = photo[100:151, 200:270]  # an odd and an even side
    assert nlpd(cut, noisy(cut, 12)) == pytest.approx(slow_nlpd(cut, noisy(cut, 12)), rel=1e-9)


def test_nlpd_equals_plenoptics_with_its_low_pass(
    photo: image.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    # plenoptic 2.1.1 blurs with binomial weights and treats borders otherwise
    monkeypatch.setattr(nlpd_module, "LOWPASS", np.array([1, 4, 6, 4, 1]) / 16)
    assert nlpd(photo, noisy(photo, 10)) == pytest.approx(0.18817, rel=2e-3)
    assert nlpd(photo, noisy(photo, 20)) == pytest.approx(0.32367, rel=2e-3)


def test_nlpd_is_zero_for_equal_pictures_and_grows_with_noise(small: image.Pixels) -> None:
    values = [nlpd(small, noisy(small, deviation)) for deviation in (0, 2, 5, 10, 20)]
    assert values[0] == 0
    assert values == sorted(set(values))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of torchvision's VGG-16 with random weights, under its names."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    with torch.device("meta"):
        names = vgg16(weights=None).features.state_dict()
    state = {f"features.{k}": torch.randn(v.shape) * 0.05 for k, v in names.items()}
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, file)
    return file


def vgg_maps(x: Tensor, file: Path, pool: nn.Module) -> list[Tensor]:
    """Outputs of the stages' last layers."""
    state = torch.load(file, weights_only=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h, index, out = (x - mean[:, None, None]) / deviation[:, None, None], 0, []
    for convolutions in (2, 2, 3, 3, 3):
        for _ in range(convolutions):
            weight, bias = (state[f"features.{index}.{kind}"] for kind in ("weight", "bias"))
            h, index = F.relu(F.conv2d(h, weight, bias, padding=1)), index + 2
        out.append(h)
        h, index = pool(h), index + 1
    return out


def test_lpips_vgg_equals_its_formula(pair: tuple[Tensor, Tensor], vgg_file: Path) -> None:
    a, b = (x[:, :, :64, :64] for x in pair)
    ours = LpipsMetric("vgg", vgg_file)
    total = 0.0
    maps = (vgg_maps(x, vgg_file, nn.MaxPool2d(2)) for x in (a, b))
    for i, (u, v) in enumerate(zip(*maps, strict=True)):
        linear = ours.net.lins[i].model[1].weight.detach()
        difference = (F.normalize(u, dim=1) - F.normalize(v, dim=1)).square()
        total += float(F.conv2d(difference, linear).mean())
    assert ours(a, b) == pytest.approx(total, rel=1e-3)
    assert total > 0


class L2Pool(nn.Module):
    """DISTS' pooling: the root of Hanning-weighted squares."""

    def forward(self, x: Tensor) -> Tensor:
        window = torch.tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(window, window).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def test_dists_equals_its_formula(pair: tuple[Tensor, Tensor], vgg_file: Path) -> None:
    a, b = (x[:, :, :64, :64] for x in pair)
    torch.manual_seed(1)
    state = torch.load(vgg_file, weights_only=True)
    alpha, beta = torch.rand(2, 1, 1475, 1, 1) / 1475
    own = vgg_file.with_name("dists.safetensors")
    save_file({**state, "alpha": alpha.clone(), "beta": beta.clone()}, own)
    similarity, start = 0.0, 0
    maps = ([x, *vgg_maps(x, vgg_file, L2Pool())] for x in (a, b))
    for u, v in zip(*maps, strict=True):
        u, v = u[0].flatten(1), v[0].flatten(1)
        part = slice(start, start := start + len(u))
        mu, mv = u.mean(1), v.mean(1)
        covariance = ((u - mu[:, None]) * (v - mv[:, None])).mean(1)
        texture = (2 * mu * mv + 1e-6) / (mu**2 + mv**2 + 1e-6)
        structure = 2 * covariance + 1e-6
        structure = structure / (u.var(1, correction=0) + v.var(1, correction=0) + 1e-6)
        weights = alpha[0, part, 0, 0], beta[0, part, 0, 0]
        similarity += float((weights[0] * texture + weights[1] * structure).sum())
    assert Dists(own)(a, b) == pytest.approx(1 - similarity, rel=1e-3)


def test_dists_of_equal_pictures_is_zero_with_the_published_mixture(
    pair: tuple[Tensor, Tensor], vgg_file: Path
) -> None:
    a, b = (x[:, :, :64, :64] for x in pair)
    dists = Dists(vgg_file)
    assert dists(a, a) == pytest.approx(0, abs=1e-4)
    assert dists(a, b) > 1e-3


def test_lpips_alex_also_reads_torchvisions_file(
    pair: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    with torch.device("meta"):
        features = alexnet(weights=None).features
    state = {k: torch.randn(v.shape) * 0.05 for k, v in features.state_dict().items()}
    features.load_state_dict(state, assign=True)
    file = tmp_path / "alexnet.pth"
    torch.save({f"features.{k}": v for k, v in state.items()}, file)
    a = pair[0][:, :, :128, :128]
    net = LpipsAlex(file)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        maps = features[:12]((a - mean[:, None, None]) / deviation[:, None, None])
    torch.testing.assert_close(net.conv5(a), maps.mean((2, 3)), rtol=1e-3, atol=1e-6)


def test_the_error_names_a_file_with_wrong_weights(tmp_path: Path, vgg_file: Path) -> None:
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"no weights")
    for load in (LpipsAlex, Dists):
        with pytest.raises(WeightsError, match=r"a\.safetensors"):
            load(broken)
    with pytest.raises(WeightsError, match="vgg16"):
        LpipsAlex(vgg_file)
    with pytest.raises(WeightsError, match=r"b\.pth"):
        Dists(tmp_path / "b.pth")


def sides(
    rng: np.random.Generator, shift: float, pictures: int = 12
) -> tuple[list[Array], list[Array]]:
    """Features of originals and decodes of the same scenes; `shift` is added to the decodes."""
    scenes = rng.standard_normal((pictures, 1, 4))
    x, y = scenes + 0.5 * rng.standard_normal((2, pictures, 3, 4))
    return list(x), list(y + shift)


def plain_kid(x: Array, y: Array) -> float:
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))


def one(statistic: bootstrap.Statistic, count: int) -> float:
    return float(statistic(np.ones((1, count)))[0])


def test_kid_is_the_double_sum_over_patches_of_different_pictures() -> None:
    rng = np.random.default_rng(0)
    x, y = sides(rng, 0.5, 4)
    x[1], y[1] = x[1][:2], y[1][:2]  # pictures have different numbers of patches
    total, pairs = 0.0, 0

    def k(a: Array, b: Array) -> float:
        kernel: float = (sum(u * v for u, v in zip(a, b, strict=True)) / 4 + 1) ** 3
        return kernel

    for p in range(4):
        for q in range(4):
            for i in range(len(x[p]) if p != q else 0):
                for j in range(len(x[q])):
                    total += k(x[p][i], x[q][j]) + k(y[p][i], y[q][j])
                    total -= k(x[p][i], y[q][j]) + k(y[p][i], x[q][j])
                    pairs += 1
    assert one(kid.statistic(x, y), 4) == pytest.approx(total / pairs)


def test_kid_equals_torchmetrics_without_pairs_from_one_picture() -> None:
    rng = np.random.default_rng(1)
    m = 20
    x, y = rng.standard_normal((2, m, 1, 8))
    cross = (x[:, 0] @ y[:, 0].T / 8 + 1) ** 3
    all_pairs = cross.mean()
    different = (cross.sum() - np.trace(cross)) / (m * (m - 1))
    expected = plain_kid(x[:, 0], y[:, 0]) + 2 * all_pairs - 2 * different
    assert one(kid.statistic(list(x), list(y)), m) == pytest.approx(expected)


def test_kid_of_one_distribution_is_zero_on_average_although_scenes_are_shared() -> None:
    rng = np.random.default_rng(2)
    draws = [sides(rng, 0) for _ in range(400)]
    ours = np.array([one(kid.statistic(*d), 12) for d in draws])
    plain = np.array([plain_kid(np.concatenate(x), np.concatenate(y)) for x, y in draws])
    assert abs(ours.mean()) < 3 * ours.std() / 20
    assert plain.mean() < -3 * plain.std() / 20  # the usual estimator is biased
    shifted = [one(kid.statistic(*sides(rng, 0.5)), 12) for _ in range(50)]
    assert np.mean(shifted) > 5 * abs(ours.mean())


def test_kid_of_equal_sets_is_zero_and_of_one_picture_is_undefined() -> None:
    x, _ = sides(np.random.default_rng(3), 0)
    assert one(kid.statistic(x, x), 12) == pytest.approx(0, abs=1e-12)
    assert bootstrap.estimate(kid.statistic(x[:1], x[:1]), 1) is None


def test_patches_tile_the_middle_of_a_picture() -> None:
    picture = torch.arange(3 * 140 * 300).reshape(1, 3, 140, 300).float()
    cut = kid.patches(picture)
    assert cut.shape == (2, 3, 128, 128)
    torch.testing.assert_close(cut[1], picture[0, :, 6:134, 150:278])
    assert len(kid.patches(picture[:, :, :127])) == 0


def test_bootstrap_intervals_of_means_equal_those_of_normal_theory() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap.estimate(bootstrap.mean(list(values)), 400)
    assert found is not None
    assert found.interval is not None
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = bootstrap.estimate(bootstrap.mean(list(rng.normal(0, 1, 40))), 40)
        assert found is not None
        assert found.interval is not None
        covered += found.interval[0] < 0 < found.interval[1]
    assert 0.90 <= covered / 200 <= 0.98


def test_bootstrap_pairs_values_and_gives_no_interval_where_none_exists() -> None:
    base = [1.0, 2.0, 5.0]
    found = bootstrap.estimate(bootstrap.ratio([0.5 * b for b in base], base), 3)
    assert found is not None
    assert found.interval == pytest.approx((0.5, 0.5))
    assert bootstrap.estimate(bootstrap.mean([4.0]), 1) == bootstrap.BootstrapEstimate(4.0, None)
    assert bootstrap.estimate(bootstrap.mean([math.inf, 1.0]), 2) is None
