"""The instant picture's network: rearranged, and by either backend."""

import copy
import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openvino as ov  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn

from models import tiles
from models.codec import codec, synthesis
from models.codec.codec import Codec
from models.codec.inference_synthesis import Folded, live
from models.codec.msh import GDN, MeanScaleHyperprior
from models.codec.synthesis import Synthesis
from models.image import Pixels
from tests.support.data import psnr


@pytest.fixture
def g_s() -> nn.Sequential:
    torch.manual_seed(0)
    return MeanScaleHyperprior(N=8, M=12).eval().requires_grad_(False).g_s


def latents(M: int, *shape: int) -> Tensor:
    return 5 * torch.randn(1, M, *shape, generator=torch.Generator().manual_seed(1))


def with_idle_channels(g_s: nn.Sequential) -> nn.Sequential:
    """The picture reads five channels, and they are made of some of those before."""
    g_s = copy.deepcopy(g_s)
    g_s[6].weight.data[5:] = 0
    g_s[4].weight.data[6:, :5] = 0
    g_s[0].weight.data[3:6] = 0
    assert isinstance(g_s[3], GDN)
    g_s[3].gamma.data[:6, 7] = 1.0  # so that one more is read, by the norm of the others
    return g_s


@pytest.mark.parametrize("backend", ["openvino", "torch"])
@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (31, 17)])
def test_windows_show_what_the_codec_s_own_network_shows(
    g_s: nn.Sequential,
    shape: tuple[int, int],
    backend: synthesis.Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    whole = g_s(latents(12, *shape)).clamp(0, 1)
    assert float(whole.std()) > 0.01
    made = Synthesis(g_s, 12, backend=backend)(latents(12, *shape))
    assert (made - whole).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_channels_that_do_not_reach_the_picture_are_left_out(
    g_s: nn.Sequential, backend: synthesis.Backend
) -> None:
    g_s = with_idle_channels(g_s)
    assert [int(mask.sum()) for mask in live(g_s)] == [9, 8, 8, 7, 7, 5, 5, 3]
    whole = g_s(latents(12, 5, 6)).clamp(0, 1)
    assert float(whole.std()) > 0.01
    made = Synthesis(g_s, 12, backend=backend)(latents(12, 5, 6))
    assert (made - whole).abs().max() < 1e-5


def test_a_network_that_reads_nothing_still_draws_its_bias(g_s: nn.Sequential) -> None:
    g_s[6].weight.data[:] = 0
    g_s[6].bias.data[:] = torch.tensor([0.2, 0.4, 0.6])
    made = Synthesis(g_s, 12)(latents(12, 4, 4))
    assert torch.allclose(made.mean((0, 2, 3)), torch.tensor([0.2, 0.4, 0.6]))


@pytest.mark.weights
def test_the_shipped_codec_needs_half_of_its_channels(shipped: Codec) -> None:
    net = Folded(shipped.net.g_s)
    assert (len(net.read), net.tail[1].conv.in_channels) == (128, 64)
    y_hat = latents(192, 8, 12) / 5
    made = Synthesis(shipped.net.g_s, 192)(y_hat)
    assert (made - shipped.net.g_s(y_hat).clamp(0, 1)).abs().max() < 1e-5


def test_threads_that_decode_at_once_get_their_own_pictures(g_s: nn.Sequential) -> None:
    own = Synthesis(g_s, 12)
    given = [latents(12, 4 + i, 6) for i in range(8)]
    made: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: made.setdefault(i, own(given[i]))) for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, y_hat in enumerate(given):
        assert (made[i] - g_s(y_hat).clamp(0, 1)).abs().max() < 1e-5


@pytest.mark.weights
def test_half_precision_is_asked_for_and_close(
    shipped: Codec, small: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors without bfloat16 compute in float32 all the same."""
    x = codec.to_tensor(small)
    y_hat = shipped.latents(shipped.encode(x, "msh", "exact")).y_hat
    asked: list[str] = []
    compile_model = ov.Core.compile_model

    def noted(own: ov.Core, model: ov.Model, device: str, options: dict[str, Any]) -> Any:
        asked.append(options["INFERENCE_PRECISION_HINT"])
        return compile_model(own, model, device, options)

    monkeypatch.setattr(ov.Core, "compile_model", noted)
    exact = Synthesis(shipped.net.g_s, 192)(y_hat)
    monkeypatch.setenv("AFTERIMAGE_GS_PRECISION", "bf16")
    made = Synthesis(shipped.net.g_s, 192)(y_hat)
    assert asked == ["f32", "bf16"]
    assert psnr(codec.to_pixels(made), codec.to_pixels(exact)) > 45


def test_what_was_compiled_is_kept_on_disk(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    first = Synthesis(g_s, 12)(latents(12, 4, 4))
    kept = list(tmp_path.rglob("*.blob"))
    assert len(kept) == 1
    assert torch.equal(Synthesis(g_s, 12)(latents(12, 4, 4)), first)
    assert list(tmp_path.rglob("*.blob")) == kept


def test_one_process_at_a_time_compiles(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO writes in place what another process may have mapped, which then dies."""
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    (tmp_path / "openvino").mkdir()
    with (tmp_path / "openvino/lock").open("a") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = pool.submit(Synthesis(g_s, 12), latents(12, 4, 4))
        with pytest.raises(TimeoutError):
            made.result(1)
        assert not list(tmp_path.rglob("*.blob"))
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert made.result(60).shape == (1, 3, 64, 64)
    assert list(tmp_path.rglob("*.blob"))


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path / "file"))
    made = Synthesis(g_s, 12)(latents(12, 4, 4))
    assert (made - g_s(latents(12, 4, 4)).clamp(0, 1)).abs().max() < 1e-5


def test_a_damaged_cache_is_done_without(
    g_s: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    first = Synthesis(g_s, 12)(latents(12, 4, 4))
    for kept in tmp_path.rglob("*.blob"):
        kept.chmod(0o600)
        kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(Synthesis(g_s, 12)(latents(12, 4, 4)), first)


def test_torch_draws_where_openvino_is_not_installed(
    g_s: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "find_spec", lambda name: None)
    assert Synthesis(g_s, 12).backend == "torch"


def test_other_shapes_are_refused(g_s: nn.Sequential) -> None:
    for shape in ((1, 11, 4, 4), (2, 12, 4, 4), (12, 4, 4)):
        with pytest.raises(ValueError, match="is needed"):
            Synthesis(g_s, 12)(torch.zeros(shape))
