"""The `exact` profile gives the same bits on any machine and with any settings."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from models.codec import bitstream, codec, idle_channels
from models.codec import exact as exact_profile
from models.codec.codec import Codec
from models.codec.exact import ExactHyperSynthesis
from models.codec.idle_channels import Convolution
from models.errors import LengthMismatch
from models.image import Pixels

pytestmark = pytest.mark.weights

SCRIPT = """
import hashlib, sys
from pathlib import Path
import numpy as np
import torch
from models.codec import bitstream, zoo
codec = zoo.load(2)
latents = codec.latents(bitstream.parse(Path(sys.argv[1]).read_bytes()))
z = torch.from_numpy(np.load(sys.argv[2]))
indexes, means = codec.latent_coder._exact(z, codec.latent_coder.medians)
digest = hashlib.sha256(indexes.tobytes() + means.numpy().tobytes())
digest.update(latents.y_hat.numpy().tobytes())
plain = codec.latent_coder._prior(z[0].numpy(), "float")[1].numpy().tobytes()
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), digest.hexdigest(),
      hashlib.sha256(plain).hexdigest())
"""


def symbols(*shape: int) -> torch.Tensor:
    """Random symbols of z, some of them large."""
    drawn = np.random.default_rng(0).standard_t(2, shape)
    return torch.from_numpy(np.rint(drawn).astype(np.int32))


@pytest.fixture(scope="module")
def exact(shipped: Codec) -> ExactHyperSynthesis:
    return shipped.latent_coder._exact


def same(a: tuple[np.ndarray, torch.Tensor], b: tuple[np.ndarray, torch.Tensor]) -> bool:  # type: ignore[type-arg]
    return np.array_equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_number_of_threads_does_not_change_the_result(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    z, before = symbols(1, 128, 6, 7), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(exact(z, shipped.latent_coder.medians))
    finally:
        torch.set_num_threads(before)
    assert same(*results)


def test_the_order_of_summation_does_not_change_the_result(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    """Reversing the channels of inputs and weights reverses the order of every sum."""
    z = symbols(1, 128, 5, 4)
    reverse = copy.deepcopy(shipped.net.h_s)
    for name, axes in (
        ("0.weight", (0, 1)), ("0.bias", (0,)), ("2.weight", (0, 1)), ("2.bias", (0,)),
        ("4.weight", (1,)),
    ):  # fmt: skip
        p = reverse.get_parameter(name)
        p.data = p.data.flip(axes)
    other = ExactHyperSynthesis(reverse, 192, shipped.latent_coder.scale_table)
    medians = shipped.latent_coder.medians
    assert same(exact(z, medians), other(z.flip(1), medians.flip(1)))


@pytest.mark.parametrize(("layer", "factor"), [(4, 1), (4, 2), (4, 5), (2, 3)])
def test_large_weights_are_scaled_across_layers(shipped: Codec, layer: int, factor: float) -> None:
    """The integer result is close to the float one, whatever the scaling between two layers is."""
    h_s = copy.deepcopy(shipped.net.h_s)
    with torch.no_grad():
        h_s.get_parameter(f"{layer}.weight").mul_(factor)
        h_s.get_parameter(f"{layer}.bias").mul_(factor)
        for later in range(layer + 2, 6, 2):  # keeps the size of the hidden channels
            h_s.get_parameter(f"{later}.weight").div_(factor)
    z, medians = symbols(1, 128, 4, 4).clamp(-1, 1), shipped.latent_coder.medians
    z *= symbols(1, 128, 4, 4).abs() > 2
    _, means = ExactHyperSynthesis(h_s, 192, shipped.latent_coder.scale_table)(z, medians)
    expected = h_s(z + medians).chunk(2, 1)[1]
    assert expected.abs().max() > 3
    torch.testing.assert_close(means, expected, atol=1e-2 * factor, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_weights_that_no_scaling_fits_are_refused(shipped: Codec, layer: int) -> None:
    h_s = copy.deepcopy(shipped.net.h_s)
    with torch.no_grad():
        h_s.get_parameter(f"{layer}.weight").mul_(2.0**12)
    with pytest.raises(ValueError, match="too large for exact sums"):
        ExactHyperSynthesis(h_s, 192, shipped.latent_coder.scale_table)


def test_memory_layout_does_not_change_the_result(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    z, medians = symbols(1, 128, 6, 7), shipped.latent_coder.medians
    other = copy.deepcopy(exact)
    other.layers.to(memory_format=torch.channels_last)
    expected = exact(z, medians)
    strided = torch.empty(1, 128, 12, 14, dtype=torch.int32)[:, :, ::2, ::2].copy_(z)
    for symbols_of_z in (z.contiguous(memory_format=torch.channels_last), strided):
        assert same(exact(symbols_of_z, medians), expected)
        assert same(other(symbols_of_z, medians), expected)


def test_onednn_does_not_change_the_result(shipped: Codec, exact: ExactHyperSynthesis) -> None:
    z, medians = symbols(1, 128, 6, 7), shipped.latent_coder.medians
    results = []
    try:
        for enabled in (True, False):
            torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
            results.append(exact(z, medians))
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    assert same(*results)


def test_other_pictures_in_the_batch_do_not_change_the_result(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    z, medians = symbols(3, 128, 4, 5), shipped.latent_coder.medians
    together = exact(z, medians)[1]
    for i in range(3):
        assert torch.equal(together[i], exact(z[i : i + 1], medians)[1][0])


def test_a_crop_gives_the_same_result_as_the_whole_picture(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    z, medians = symbols(1, 128, 9, 8), shipped.latent_coder.medians
    whole = exact(z, medians)
    cut = exact(z[:, :, 1:8, 2:], medians)
    margin = 8  # `h_s` reaches less than 2 positions of z
    inner = slice(4 + margin, 32 - margin), slice(8 + margin, None)
    part = slice(margin, 28 - margin), slice(margin, None)
    assert np.array_equal(whole[0][:, *inner], cut[0][:, *part])
    assert torch.equal(whole[1][:, :, *inner], cut[1][:, :, *part])


def test_the_height_of_strips_does_not_change_the_result(
    shipped: Codec, exact: ExactHyperSynthesis, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, medians = symbols(1, 128, 9, 8), shipped.latent_coder.medians
    whole = exact(z, medians)
    for positions in (1, 40, 100):
        monkeypatch.setattr(exact_profile, "STRIP", positions)
        assert same(exact(z, medians), whole)


def test_the_largest_symbols_of_z_stay_within_exact_sums(
    shipped: Codec, exact: ExactHyperSynthesis
) -> None:
    """They saturate, and the result equals that of int64 arithmetic."""
    z = symbols(1, 128, 2, 2).sign() * (2**30 - 1)
    x = torch.full_like(z, ExactHyperSynthesis.LIMIT, dtype=torch.float64) * z.sign()
    means = exact(z, torch.zeros_like(shipped.latent_coder.medians))[1]
    nonzero = exact.outputs.chunk(2)[1]
    assert torch.equal(means[:, nonzero], _integers(exact, x[:, exact.inputs]))
    assert not means[:, ~nonzero].any()


def test_the_exact_profile_leaves_out_idle_channels_and_gives_the_same_bits(
    shipped: Codec, exact: ExactHyperSynthesis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_channels(layers: nn.Sequential, wanted: torch.Tensor) -> list[torch.Tensor]:
        widths = (128, 192, 192, 288, 288)  # inputs of the layers
        return [*(torch.ones(width, dtype=torch.bool) for width in widths), wanted]

    monkeypatch.setattr(idle_channels, "used_channels", all_channels)
    monkeypatch.setattr(
        idle_channels, "nonzero_channels", lambda s: torch.ones(s.out_channels, dtype=torch.bool)
    )
    coder = shipped.latent_coder
    whole = ExactHyperSynthesis(shipped.net.h_s, shipped.net.M, coder.scale_table)
    inputs = [
        [layer.in_channels for layer in h_s.layers if isinstance(layer, Convolution)]
        for h_s in (whole, exact)
    ]
    assert inputs == [[128, 192, 288], [64, 128, 192]]
    z = symbols(2, 128, 5, 7)
    assert same(exact(z, coder.medians), whole(z, coder.medians))


def test_h_s_of_zeros_gives_the_smallest_scales_and_no_means(shipped: Codec) -> None:
    h_s = copy.deepcopy(shipped.net.h_s)
    for parameter in h_s.parameters():
        parameter.data.zero_()
    indexes, means = ExactHyperSynthesis(h_s, 192, shipped.latent_coder.scale_table)(
        symbols(1, 128, 2, 2), shipped.latent_coder.medians
    )
    assert not indexes.any() and not means.any()


def _integers(exact: ExactHyperSynthesis, x: torch.Tensor) -> torch.Tensor:
    """Compute the means layer by layer in int64."""
    limit, one = int(ExactHyperSynthesis.LIMIT), 1 << exact_profile.BITS
    v = x.to(torch.int64)
    for layer in exact.layers:
        if isinstance(layer, nn.LeakyReLU):
            v = torch.where(v < 0, v * exact_profile.SLOPE >> exact_profile.BITS, v)
            continue
        assert isinstance(layer, Convolution)
        assert layer.bias is not None
        weight, bias = layer.weight.to(torch.int64), layer.bias.to(torch.int64)
        if isinstance(layer, nn.ConvTranspose2d):
            # zeros between the samples, then a convolution with the mirrored kernel
            b, c, h, w = v.shape
            spread = torch.zeros(b, c, 2 * h, 2 * w, dtype=torch.int64)
            spread[:, :, ::2, ::2] = v
            v, weight = spread, weight.transpose(0, 1).flip(2, 3)
        k = weight.shape[2] // 2
        rows, columns = v.shape[2:]
        padded = nn.functional.pad(v, (k, k, k, k))
        total = bias[None, :, None, None].expand(1, -1, rows, columns).clone()
        for i in range(2 * k + 1):
            for j in range(2 * k + 1):
                part = padded[0, :, i : i + rows, j : j + columns].reshape(v.shape[1], -1)
                total += (weight[:, :, i, j] @ part).reshape(1, -1, rows, columns)
        v = (total // one).clamp(-limit, limit)
    means = v[:, int(exact.outputs.chunk(2)[0].sum()) :]
    return (torch.div(means + 8, 16, rounding_mode="floor").double() / 4096).float()


def here(*arguments: str) -> list[str]:
    """Run `SCRIPT` in this process, with two threads; return the words that it prints."""
    threads, out = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(2)
    try:
        with mock.patch.object(sys, "argv", ["", *arguments]), contextlib.redirect_stdout(out):
            exec(SCRIPT, {})
    finally:
        torch.set_num_threads(threads)
    return out.getvalue().split()


@pytest.mark.slow
def test_the_instruction_set_does_not_change_the_result(
    shipped: Codec, photo: Pixels, tmp_path: Path
) -> None:
    b = shipped.encode(codec.to_tensor(photo[:256, :256].copy()), "msh", "exact")
    (tmp_path / "b").write_bytes(bitstream.serialize(b))
    np.save(tmp_path / "z.npy", symbols(1, 128, 8, 12).numpy())
    files = str(tmp_path / "b"), str(tmp_path / "z.npy")
    outputs = [here(*files)]
    for onednn, aten in (("AVX2", "avx2"), ("SSE41", "default")):
        settings = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
        done = subprocess.run(
            [sys.executable, "-P", "-c", SCRIPT, *files],
            env=os.environ | settings | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        outputs.append(done.stdout.split())
    capabilities, threads_of, exact_digests, float_digests = zip(*outputs, strict=True)
    assert capabilities[2] == "DEFAULT"
    assert threads_of[0] == "2"
    assert len(set(exact_digests)) == 1
    assert len(set(float_digests)) > 1  # float32 differs, which is why recovery exists


@pytest.mark.parametrize("size", [(64, 65), (100, 128)])
def test_sizes_that_are_not_multiples_of_64_are_refused(
    shipped: Codec, size: tuple[int, int]
) -> None:
    with pytest.raises(LengthMismatch):
        shipped.latent_coder.decode(bytes(8), bytes(8), size, "exact")


def test_weights_too_large_for_exact_sums_are_refused(shipped: Codec) -> None:
    h_s = copy.deepcopy(shipped.net.h_s)
    h_s.get_parameter("2.weight").data *= 1e4
    with pytest.raises(ValueError, match="exact sums"):
        ExactHyperSynthesis(h_s, 192, shipped.latent_coder.scale_table)
