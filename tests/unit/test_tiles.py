"""Windows, and the analysis transform in windows."""

import pytest
import torch

from models import tiles
from models.codec.msh import MeanScaleHyperprior
from models.diffusion import decoder


@pytest.fixture(scope="module")
def tiny() -> MeanScaleHyperprior:
    torch.manual_seed(0)
    return MeanScaleHyperprior(N=8, M=12).eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (31, 17)])
def test_analysis_in_windows_gives_the_same_latents_as_the_whole_picture(
    tiny: MeanScaleHyperprior, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CODEC_WINDOW", 12 * 12)
    x = torch.rand(1, 3, 16 * shape[0], 16 * shape[1])
    whole = tiny.g_a(x)
    assert (tiles.analyse(tiny.g_a, x, 12) - whole).abs().max() < 1e-5 * float(whole.abs().max())


@pytest.mark.parametrize(
    ("rows", "columns", "area", "overlap"),
    [(1, 1, 100, 3), (135, 240, 5430, 3), (88, 128, 5430, 8), (4, 900, 1000, 4), (300, 5, 800, 6)],
)
def test_windows_keep_every_position_once_and_read_the_overlap_around_it(
    rows: int, columns: int, area: int, overlap: int
) -> None:
    kept = torch.zeros(1, 1, rows, columns)
    for w in tiles.windows(rows, columns, area, overlap):
        top, bottom, left, right = w.read
        assert (bottom - top) * (right - left) <= area
        kept[w.writes(1)] += 1
        read = torch.arange(rows * columns).reshape(1, 1, rows, columns)[w.reads(1)]
        inner = torch.arange(rows * columns).reshape(1, 1, rows, columns)[w.writes(1)]
        assert torch.equal(read[w.within(1)], inner)
        for edge, near, limit in zip(w.kept, w.read, (0, rows, 0, columns), strict=True):
            assert abs(edge - near) == overlap or near == limit
    assert torch.equal(kept, torch.ones_like(kept))


def test_windows_that_are_too_small_for_their_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="288 positions is too small for an overlap of 8"):
        list(tiles.windows(40, 40, 288, 8))
    assert len(list(tiles.windows(16, 18, 288, 8))) == 1


def test_a_4k_picture_computes_less_than_17_percent_twice() -> None:
    read = sum(
        (w.read[1] - w.read[0]) * (w.read[3] - w.read[2])
        for w in tiles.windows(135, 240, decoder.WINDOW, decoder.OVERLAP)
    )
    assert read / (135 * 240) < 1.17
