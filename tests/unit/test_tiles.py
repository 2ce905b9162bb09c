"""Analysis and synthesis in tiles and whole."""

import pytest
import torch

from models import tiles
from models.msh import MeanScaleHyperprior
from models.synthesis import Synthesis


@pytest.fixture(scope="module")
def tiny() -> MeanScaleHyperprior:
    torch.manual_seed(0)
    return MeanScaleHyperprior(N=8, M=12).eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (31, 17)])
def test_tiles_show_the_same_picture_as_the_whole(
    tiny: MeanScaleHyperprior, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 8)
    y_hat = 5 * torch.randn(1, 12, *shape)
    whole = tiny.g_s(y_hat).clamp(0, 1)
    assert float(whole.std()) > 0.01
    assert (Synthesis(tiny.g_s, 12)(y_hat) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (31, 17)])
def test_tiles_have_the_same_latents_as_the_whole(
    tiny: MeanScaleHyperprior, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 8)
    x = torch.rand(1, 3, 16 * shape[0], 16 * shape[1])
    whole = tiny.g_a(x)
    assert (tiles.analyse(tiny.g_a, x, 12) - whole).abs().max() < 1e-5 * float(whole.abs().max())


def test_other_shapes_are_refused(tiny: MeanScaleHyperprior) -> None:
    for shape in ((1, 11, 4, 4), (2, 12, 4, 4), (12, 4, 4)):
        with pytest.raises(ValueError, match="12"):
            Synthesis(tiny.g_s, 12)(torch.zeros(shape))
