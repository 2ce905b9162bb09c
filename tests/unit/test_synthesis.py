"""The synthesis network for inference, with all backends."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from models import cancellation, tiles
from models.codec import codec, synthesis
from models.codec.codec import Codec
from models.codec.idle_channels import used_channels
from models.codec.inference_synthesis import InferenceSynthesis, SubPixel
from models.codec.msh import GDN, MeanScaleHyperprior
from models.codec.openvino_synthesis import OpenVinoSynthesis
from models.codec.synthesis import Synthesis
from models.codec.winograd import WinogradSynthesis
from models.errors import Canceled, ParameterError
from models.folders import UntrustedFolder
from models.image import Pixels
from tests.support.data import psnr
from tests.support.waiting import until


@pytest.fixture
def g_s() -> nn.Sequential:
    torch.manual_seed(0)
    return MeanScaleHyperprior(N=8, M=12).eval().requires_grad_(False).g_s


def latents(M: int, *shape: int) -> Tensor:
    return 5 * torch.randn(1, M, *shape, generator=torch.Generator().manual_seed(1))


def with_idle_channels(g_s: nn.Sequential) -> nn.Sequential:
    """A copy of `g_s` whose picture depends on five channels, and these on some of the channels."""
    g_s = copy.deepcopy(g_s)
    g_s.get_parameter("6.weight").data[5:] = 0
    g_s.get_parameter("4.weight").data[6:, :5] = 0
    g_s.get_parameter("0.weight").data[3:6] = 0
    assert isinstance(g_s[3], GDN)
    g_s[3].gamma.data[:6, 7] = 1.0  # one more channel is used by the norm of others
    return g_s


@pytest.mark.parametrize("backend", ["winograd", "openvino", "torch"])
@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (31, 17)])
def test_synthesis_in_windows_equals_the_original_network(
    g_s: nn.Sequential,
    shape: tuple[int, int],
    backend: synthesis.Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    whole = g_s(latents(12, *shape)).clamp(0, 1)
    assert float(whole.std()) > 0.01
    x_hat = Synthesis(g_s, 12, backend=backend)(latents(12, *shape))
    assert (x_hat - whole).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["winograd", "openvino", "torch"])
def test_channels_that_do_not_affect_the_picture_are_removed(
    g_s: nn.Sequential, backend: synthesis.Backend
) -> None:
    g_s = with_idle_channels(g_s)
    masks = used_channels(g_s, torch.ones(3, dtype=torch.bool))
    assert [int(mask.sum()) for mask in masks] == [9, 8, 8, 7, 7, 5, 5, 3]
    whole = g_s(latents(12, 5, 6)).clamp(0, 1)
    assert float(whole.std()) > 0.01
    x_hat = Synthesis(g_s, 12, backend=backend)(latents(12, 5, 6))
    assert (x_hat - whole).abs().max() < 1e-5


def test_a_network_without_any_used_channel_gives_its_bias(g_s: nn.Sequential) -> None:
    g_s.get_parameter("6.weight").data[:] = 0
    g_s.get_parameter("6.bias").data[:] = torch.tensor([0.2, 0.4, 0.6])
    x_hat = Synthesis(g_s, 12)(latents(12, 4, 4))
    assert torch.allclose(x_hat.mean((0, 2, 3)), torch.tensor([0.2, 0.4, 0.6]))


@pytest.mark.weights
def test_the_shipped_codec_needs_half_of_its_channels(shipped: Codec) -> None:
    net = InferenceSynthesis(shipped.net.g_s)
    last = net.tail[1]
    assert isinstance(last, SubPixel)
    assert (len(net.channels), last.conv.in_channels) == (128, 64)
    y_hat = latents(192, 8, 12) / 5
    x_hat = Synthesis(shipped.net.g_s, 192)(y_hat)
    assert (x_hat - shipped.net.g_s(y_hat).clamp(0, 1)).abs().max() < 1e-5


def test_concurrent_threads_get_the_right_pictures(g_s: nn.Sequential) -> None:
    synthesise = Synthesis(g_s, 12)
    inputs = [latents(12, 4 + i, 6) for i in range(8)]
    results: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.setdefault(i, synthesise(inputs[i])))
        for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, y_hat in enumerate(inputs):
        assert (results[i] - g_s(y_hat).clamp(0, 1)).abs().max() < 1e-5


@pytest.mark.weights
def test_bfloat16_is_requested_and_close_to_float32(
    shipped: Codec, small: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors without bfloat16, OpenVINO computes in float32."""
    monkeypatch.delenv("AFTERIMAGE_CACHE_DIR", raising=False)  # nothing is compiled if it is cached
    x = codec.to_tensor(small)
    y_hat = shipped.latents(shipped.encode(x, "msh", "exact")).y_hat
    precisions: list[str] = []
    compile_model = ov.Core.compile_model

    def record(core: ov.Core, model: ov.Model, device: str, options: dict[str, Any]) -> Any:
        precisions.append(options["INFERENCE_PRECISION_HINT"])
        return compile_model(core, model, device, options)

    monkeypatch.setattr(ov.Core, "compile_model", record)
    exact = Synthesis(shipped.net.g_s, 192)(y_hat)
    monkeypatch.setenv("AFTERIMAGE_GS_PRECISION", "bf16")
    half = Synthesis(shipped.net.g_s, 192)(y_hat)
    assert precisions == ["f32", "bf16"]
    assert psnr(codec.to_pixels(half), codec.to_pixels(exact)) > 45


def test_the_compiled_network_is_cached_on_disk(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    first = Synthesis(g_s, 12)(latents(12, 4, 4))
    cached = list(tmp_path.rglob("*.blob"))
    assert len(cached) == 1
    assert torch.equal(Synthesis(g_s, 12)(latents(12, 4, 4)), first)
    assert list(tmp_path.rglob("*.blob")) == cached


def test_a_cache_folder_that_cannot_be_written_is_not_used(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path / "file"))
    x_hat = Synthesis(g_s, 12)(latents(12, 4, 4))
    assert (x_hat - g_s(latents(12, 4, 4)).clamp(0, 1)).abs().max() < 1e-5


def test_a_damaged_compiled_network_is_not_run_but_made_again(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    first = Synthesis(g_s, 12)(latents(12, 4, 4))
    [file] = tmp_path.rglob("*.blob")
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    loaded: list[bytes] = []
    load = ov.Core.import_model

    def counted(*args: Any) -> Any:
        loaded.append(args[1])
        return load(*args)

    monkeypatch.setattr(ov.Core, "import_model", counted)
    for number, damaged in enumerate((flipped, data[:-1], data[:100], data[:middle], b"")):
        file.write_bytes(damaged)
        assert torch.equal(Synthesis(g_s, 12)(latents(12, 4, 4)), first)
        assert not loaded
        lines = [r for r in caplog.records if f"{file} is damaged" in r.getMessage()]
        assert len(lines) == number + 1
        assert torch.equal(Synthesis(g_s, 12)(latents(12, 4, 4)), first)
        assert len(loaded) == 1  # from the file that was made again
        loaded.clear()


def test_a_compiled_network_of_other_weights_or_settings_is_not_loaded(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    Synthesis(g_s, 12)(latents(12, 4, 4))
    g_s.get_parameter("6.weight").data[0, 0, 0, 0] += 1
    changed = Synthesis(g_s, 12)(latents(12, 4, 4))
    assert torch.allclose(changed, g_s(latents(12, 4, 4)).clamp(0, 1), atol=1e-5)
    monkeypatch.setenv("AFTERIMAGE_GS_PRECISION", "bf16")
    Synthesis(g_s, 12)(latents(12, 4, 4))
    assert len(list(tmp_path.rglob("*.blob"))) == 3


def test_the_compiled_network_of_another_user_is_not_loaded(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    Synthesis(g_s, 12)(latents(12, 4, 4))
    (tmp_path / "openvino").chmod(0o777)
    with pytest.raises(UntrustedFolder, match="openvino is not safe: every user may write"):
        Synthesis(g_s, 12)(latents(12, 4, 4))


def test_a_prepared_synthesis_gives_the_same_picture(g_s: nn.Sequential) -> None:
    y_hat = latents(12, 4, 4)
    prepared = Synthesis(g_s, 12)
    assert "net" not in prepared.__dict__  # loading weights does not load OpenVINO
    prepared.prepare()
    assert torch.equal(prepared(y_hat), Synthesis(g_s, 12)(y_hat))


def test_an_error_of_preparing_is_raised_by_the_first_call(
    g_s: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_GS_PRECISION", "f31")
    prepared = Synthesis(g_s, 12)
    prepared.prepare()
    with pytest.raises(ParameterError, match="AFTERIMAGE_GS_PRECISION=f31: choose f32, bf16"):
        prepared(latents(12, 4, 4))


def test_openvino_runs_few_channels_and_winograd_convolutions_run_many(
    g_s: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = MeanScaleHyperprior(N=96, M=96).g_s
    assert isinstance(Synthesis(g_s, 12).net, OpenVinoSynthesis)
    assert isinstance(Synthesis(wide, 96).net, WinogradSynthesis)
    monkeypatch.setenv("AFTERIMAGE_GS_PRECISION", "bf16")  # only OpenVINO has it
    assert isinstance(Synthesis(wide, 96).net, OpenVinoSynthesis)
    monkeypatch.setattr(synthesis, "find_spec", lambda name: None)  # without OpenVINO
    assert isinstance(Synthesis(wide, 96).net, WinogradSynthesis)
    assert isinstance(Synthesis(g_s, 12).net, InferenceSynthesis)


def test_other_shapes_are_refused(g_s: nn.Sequential) -> None:
    for shape in ((1, 11, 4, 4), (2, 12, 4, 4), (12, 4, 4)):
        with pytest.raises(ValueError, match="is needed"):
            Synthesis(g_s, 12)(torch.zeros(shape))


@pytest.mark.parametrize("backend", ["winograd", "openvino", "torch"])
def test_samples_are_the_rounded_picture(
    g_s: nn.Sequential, backend: synthesis.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    run = Synthesis(g_s, 12, backend=backend)
    y_hat = latents(12, 12, 20)
    samples = run.samples(y_hat)
    assert samples.dtype == torch.uint8
    assert samples.equal((run(y_hat) * 255).round().to(torch.uint8))


def test_synthesis_is_canceled_between_windows(
    g_s: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    run = Synthesis(g_s, 12, backend="torch")
    calls: list[Tensor] = []
    canceled, net = threading.Event(), run.net

    def cancel_in_the_second(window: Tensor) -> Tensor:
        calls.append(window)
        if len(calls) == 2:
            canceled.set()
        return net(window)

    run.net = cancel_in_the_second
    with cancellation.cancelable(canceled), pytest.raises(Canceled):
        run(latents(12, 40, 40))
    assert len(calls) == 2


def test_a_small_picture_passes_a_large_one_between_two_windows(
    g_s: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    run = Synthesis(g_s, 12, backend="torch")
    order: list[tuple[int, ...]] = []
    begun, go, net = threading.Event(), threading.Event(), run.net

    def note(window: Tensor) -> Tensor:
        order.append(tuple(window.shape[2:]))
        begun.set()
        go.wait(10)
        return net(window)

    run.net = note
    with ThreadPoolExecutor(3) as pool:
        large = [pool.submit(run, latents(12, 24, 24)) for _ in range(2)]
        begun.wait(10)
        small = pool.submit(run, latents(12, 4, 4))
        until(lambda: len(run._turns._waiting) == 2, "both others wait")
        go.set()
        small.result()
        assert order.index((4, 4)) == 1
        assert [future.result().shape for future in large] == [(1, 3, 384, 384)] * 2
