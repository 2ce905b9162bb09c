"""The documentation shows the figures of the shipped weights' evaluation."""

import json
import re
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from models import checkpoint
from models.tiers import TIERS

ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "tests/bench/results/evaluation"
DOCUMENT: dict[str, Any] = json.loads((EVALUATION / "evaluation.json").read_text())
SPEED: dict[str, Any] = json.loads((ROOT / "tests/bench/results/diffusion.json").read_text())
COLUMNS = {
    "quality": "quality", "pictures": "pictures", "bpp": "bpp", "PSNR": "psnr",
    "MS-SSIM": "ms_ssim", "LPIPS": "lpips", "LPIPS-Alex": "lpips", "NLPD": "nlpd", "GMSD": "gmsd",
    "NIQE": "niqe", "KID": "kid", "seconds": "seconds",
}  # fmt: skip
"""Column of a table -> its field in evaluation.json."""
SECONDS = {"seconds, float32": "f32", "bfloat16": "bf16"}
"""Column of the README's table -> precision of the benchmark."""
NONE = "–"


def tables(page: Path) -> list[str]:
    """The Markdown tables of a page, in their order."""
    return re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M)


def rows(table: str) -> list[dict[str, str]]:
    """Column -> cell of each row; backticks are left out."""
    header, _, *body = [
        [cell.strip().strip("`") for cell in line.strip("| ").split("|")]
        for line in table.splitlines()
    ]
    return [dict(zip(header, cells, strict=True)) for cells in body]


def measured(quality: int, tier: str) -> dict[str, Any]:
    """The summary of one tier at one quality."""
    (line,) = (e for e in DOCUMENT["summary"] if (e["quality"], e["tier"]) == (quality, tier))
    found: dict[str, Any] = line
    return found


def seconds(tier: str, precision: str) -> float:
    """Seconds from the bytes to the PNG file, on one thread."""
    (row,) = (r for r in SPEED["files"] if (r["precision"], r["threads"]) == (precision, 1))
    return float(row["tiers_s"][tier])


def assert_rounded(cell: str, value: float) -> None:
    """`cell` is `value` rounded to two or more significant digits; integers are exact."""
    decimals = len(cell.partition(".")[2])
    assert cell == f"{value:.{decimals}f}"
    digits = cell.replace(".", "").lstrip("0")
    assert len(digits) >= 2 or isinstance(value, int), f"{cell} is too coarse for {value}"


def test_the_evaluation_is_of_the_shipped_decoder() -> None:
    entries = checkpoint.decoder_entries()
    assert DOCUMENT["decoders"] == [entries[steps].weights_id for steps in sorted(entries)]
    assert {(line["quality"], line["pictures"]) for line in DOCUMENT["summary"]} >= {
        (1, 24), (2, 24), (3, 24)
    }  # fmt: skip


def test_the_readme_shows_every_tier_with_the_evaluations_figures() -> None:
    (table,) = (t for t in tables(ROOT / "README.md") if t.startswith("| tier |"))
    lines = rows(table)
    assert [line["tier"] for line in lines] == list(TIERS)
    for line in lines:
        settings = TIERS[line.pop("tier")].settings
        sampler, steps = line.pop("sampler"), line.pop("steps")
        assert sampler == (settings.sampler.upper() if settings else NONE)
        assert steps == (str(settings.steps) if settings else NONE)
    assert {"pictures", "PSNR", "LPIPS", "NIQE", "KID", *SECONDS} == set(lines[0])
    for tier, line in zip(TIERS, lines, strict=True):
        for column, cell in line.items():
            if column in SECONDS:
                assert_rounded(cell, seconds(tier, SECONDS[column]))
            else:
                assert_rounded(cell, measured(2, tier)[COLUMNS[column]])


def test_the_readmes_text_below_its_table_agrees_with_the_evaluation() -> None:
    text = (ROOT / "README.md").read_text()
    instant = measured(2, "instant")
    assert f"quality 2 ({instant['bpp']:.4f} bits per pixel)" in text
    assert f"originals' {instant['niqe_original']:.2f}" in text
    whole = [line for line in DOCUMENT["summary"] if line["pictures"] == instant["pictures"]]
    for quality in (1, 2, 3):
        tiers = [line for line in whole if line["quality"] == quality and line["tier"] in TIERS]
        for measure in ("lpips", "kid"):
            assert min(tiers, key=itemgetter(measure))["tier"] == "perceptual"


def test_the_evaluations_first_table_shows_its_figures() -> None:
    lines = rows(tables(EVALUATION / "evaluation.md")[0])
    assert len(lines) == len(DOCUMENT["summary"])
    for line in lines:
        summary = measured(int(line["quality"]), line.pop("tier"))
        for column, cell in line.items():
            assert_rounded(cell, summary[COLUMNS[column]])


def test_the_model_card_shows_the_evaluations_second_table() -> None:
    table = tables(EVALUATION / "evaluation.md")[1]
    assert table in (ROOT / "models/weights/compact.md").read_text()


@pytest.mark.parametrize("entry", checkpoint.manifest(), ids=lambda e: e.name)
def test_model_cards_contain_the_weights_id(entry: checkpoint.Entry) -> None:
    assert f"`{entry.weights_id}`" in (checkpoint.WEIGHTS / entry.card).read_text()


@pytest.mark.parametrize(
    "page", ["README.md", "tests/bench/README.md", "tests/bench/results/evaluation/evaluation.md"]
)
def test_the_images_of_a_page_exist(page: str) -> None:
    file = ROOT / page
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text())
    assert images
    for name in images:
        assert (file.parent / name).is_file(), name
