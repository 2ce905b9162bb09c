"""Evaluation: its sums, and one pass over a picture from real bytes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from models import image
from models.evaluate import __main__ as evaluate
from models.evaluate.__main__ import Row, summary, table
from models.evaluate.metrics import mse, offset


def row(**changed: object) -> Row:
    values: dict[str, object] = {
        "picture": "a", "quality": 2, "tier": "instant", "seed": 0, "bpp": 0.2, "mse": 1e-3,
        "lpips": 0.2, "offset": 0.1, "shift": 0.0, "seeds_mse": 0.0, "seconds": 1.0,
    }  # fmt: skip
    return Row(**{**values, **changed})  # type: ignore[arg-type]


def test_metrics_of_a_known_difference() -> None:
    a = torch.zeros(1, 3, 8, 8)
    b = a.clone()
    b[:, 1] = 0.1
    assert mse(a, b) == pytest.approx(0.01 / 3)
    assert offset(a, b) == pytest.approx(25.5)
    assert evaluate.psnr(1e-3) == pytest.approx(30)
    assert evaluate.psnr(0) == math.inf


def test_the_summary_compares_with_the_codecs_own_picture() -> None:
    rows = [
        row(),
        row(picture="b", mse=1e-4, lpips=0.1),
        row(tier="ddim-10", mse=2e-3, lpips=0.1, shift=0.2),
        row(tier="ddim-10", mse=2e-3, lpips=0.1, seed=1, seeds_mse=5e-4),
        row(tier="ddim-10", picture="b", mse=2e-4, lpips=0.2),
    ]
    instant, drawn = summary(rows)
    assert instant["psnr"] == pytest.approx(35)
    assert instant["lpips"] == pytest.approx(0.15)
    assert drawn["psnr_loss"] == pytest.approx(10 * math.log10(2))
    assert drawn["seeds_ratio"] == pytest.approx(0.5)
    assert (drawn["worse_lpips"], drawn["pictures"], drawn["shift_max"]) == (1, 2, 0.2)
    assert table([instant, drawn]).count("\n") == 4


@pytest.mark.weights
def test_a_pass_writes_figures_from_real_bytes(
    tmp_path: Path, small: image.Pixels, lpips_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(image.write(small, "png"))
    options = {"--pictures": tmp_path / "in", "--lpips": lpips_file, "--out": tmp_path / "out"}
    words = [str(w) for pair in options.items() for w in pair]
    words += ["--qualities", "2", "--tiers", "instant", "ddim-10", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    evaluate.main()
    document = json.loads((tmp_path / "out/evaluation.json").read_text())
    instant, drawn = document["summary"]
    assert instant["psnr"] > 28
    assert instant["bpp"] > 0.1
    assert drawn["seeds_ratio"] > 0
    assert drawn["shift_max"] < 0.5
    assert len(document["rows"]) == 3
    assert "ddim-10" in (tmp_path / "out/evaluation.md").read_text()
