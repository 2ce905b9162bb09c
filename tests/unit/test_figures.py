"""What pages say of the shipped weights is what their evaluation found."""

import json
import re
from pathlib import Path

import pytest

from models import checkpoint

ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "tests/bench/results/evaluation"


def test_the_evaluation_is_of_the_shipped_decoder() -> None:
    document = json.loads((EVALUATION / "evaluation.json").read_text())
    assert [document["decoder"]] == [
        e.weights_id for e in checkpoint.manifest() if e.kind == "decoder"
    ]
    assert {(line["quality"], line["pictures"]) for line in document["summary"]} >= {
        (1, 24), (2, 24), (3, 24)
    }  # fmt: skip


@pytest.mark.parametrize(("page", "table"), [("README.md", 0), ("models/weights/compact.md", 1)])
def test_pages_show_its_tables(page: str, table: int) -> None:
    report = (EVALUATION / "evaluation.md").read_text()
    assert re.findall(r"(?:^\|.*\n)+", report, re.M)[table] in (ROOT / page).read_text()


@pytest.mark.parametrize("entry", checkpoint.manifest(), ids=lambda e: e.name)
def test_cards_name_their_weights(entry: checkpoint.Entry) -> None:
    assert f"`{entry.weights_id}`" in (checkpoint.WEIGHTS / entry.card).read_text()


@pytest.mark.parametrize("page", ["README.md", EVALUATION / "evaluation.md"])
def test_pictures_of_pages_are_there(page: str | Path) -> None:
    file = ROOT / page
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text())
    assert shown
    for name in shown:
        assert (file.parent / name).is_file(), name
