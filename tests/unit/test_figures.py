"""Tables and figures in the documentation equal those of the committed evaluation."""

import json
import re
from pathlib import Path

import pytest

from models import checkpoint

ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "tests/bench/results/evaluation"


def test_the_evaluation_is_of_the_shipped_decoder_and_of_24_pictures_per_quality() -> None:
    document = json.loads((EVALUATION / "evaluation.json").read_text())
    assert [document["decoder"]] == [
        e.weights_id for e in checkpoint.manifest() if e.kind == "decoder"
    ]
    assert {(line["quality"], line["pictures"]) for line in document["summary"]} >= {
        (1, 24), (2, 24), (3, 24)
    }  # fmt: skip


@pytest.mark.parametrize(("page", "table"), [("README.md", 0), ("models/weights/compact.md", 1)])
def test_pages_contain_the_tables_of_the_evaluation(page: str, table: int) -> None:
    report = (EVALUATION / "evaluation.md").read_text()
    assert re.findall(r"(?:^\|.*\n)+", report, re.M)[table] in (ROOT / page).read_text()


@pytest.mark.parametrize("entry", checkpoint.manifest(), ids=lambda e: e.name)
def test_model_cards_contain_the_weights_id(entry: checkpoint.Entry) -> None:
    assert f"`{entry.weights_id}`" in (checkpoint.WEIGHTS / entry.card).read_text()


@pytest.mark.parametrize("page", ["README.md", EVALUATION / "evaluation.md"])
def test_pictures_of_pages_exist(page: str | Path) -> None:
    file = ROOT / page
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text())
    assert names
    for name in names:
        assert (file.parent / name).is_file(), name
