"""The documentation agrees with the code: variables, links, files, commands, the example's id."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models import checkpoint
from models.codec import bitstream
from models.tiers import TIERS, decoder_for
from service.cli.main import _parser
from worker.queue.records import DecodeRequest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "deploy/OPERATING.md",
    "tests/bench/README.md", "models/train/README.md", "models/weights/compact.md",
    "models/weights/msh.md",
)  # fmt: skip
MAX_ROW = 100
"""Characters in a row of README's tables, so that they fit on a screen."""


def code_blocks(page: str, language: str) -> list[str]:
    """The contents of a page's fenced blocks in one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tables_of_environment_variables_are_up_to_date(tmp_path: Path) -> None:
    page = (ROOT / "deploy/OPERATING.md").read_text()
    script = tmp_path / "variables.py"
    script.write_text((ROOT / "deploy/variables.py").read_text())
    outdated = re.sub(r"^\| `AFTERIMAGE_NICE` .*\n", "", page, flags=re.M)
    assert outdated != page
    (tmp_path / "OPERATING.md").write_text(outdated)
    subprocess.run([sys.executable, "-P", script], check=True)
    assert (tmp_path / "OPERATING.md").read_text() == page, "run `make docs`"


def test_every_generated_row_has_a_description() -> None:
    page = (ROOT / "deploy/OPERATING.md").read_text()
    assert "| None |" not in page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md"])  # it names old files
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(
        r"`((?:\.ci|deploy|docs|models|service|tests|worker)/[\w./-]+)`", (ROOT / page).read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_are_named_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make (\S+)", text, re.M))
    assert named <= targets


def test_commands_in_the_readme_are_accepted_by_the_command_line() -> None:
    lines = "".join(code_blocks("README.md", "sh")).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if "bin/afterimage" in line]
    assert len(commands) > 4
    for _, *arguments in commands:
        _parser().parse_args(arguments)


def test_the_readmes_examples_name_files_that_exist_and_write_none_into_the_repository() -> None:
    examples = "".join(code_blocks("README.md", "sh") + code_blocks("README.md", "console"))
    outputs = re.findall(r"(?:-o|-D) +(\S+)", examples)
    assert outputs
    assert [o for o in outputs if not o.startswith("/tmp/") and o != "-"] == []
    inputs = re.findall(r"(?:@|encode )(tests/\S+)", examples)
    assert inputs
    assert [i for i in inputs if not list(ROOT.glob(i.rstrip("'")))] == []
    (python,) = code_blocks("README.md", "python")
    names = {node.id for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Name)}
    assert names == {"Client", "Path", "client", "data", "print", "update"}


def test_the_readmes_typescript_is_the_tested_program() -> None:
    (program,) = code_blocks("README.md", "typescript")
    assert program == (ROOT / "tests/typescript/decode.ts").read_text()


def test_the_readmes_example_shows_the_id_that_the_service_computes() -> None:
    (example,) = code_blocks("README.md", "console")
    data = (ROOT / "tests/data/kodim23.msh").read_bytes()
    b = bitstream.parse(data)
    settings = TIERS["perceptual"].settings
    assert settings is not None
    decoder = decoder_for(checkpoint.decoder_entries(), settings).weights_id
    decode = DecodeRequest(
        bitstream.digest(data), "perceptual", settings, 0, b.weights_id, decoder, b.quality,
        b.width, b.height,
    )  # fmt: skip
    ids = set(re.findall(r"[0-9a-f]{32}", example))
    assert ids == {decode.id} != {replace(decode, seed=1).id}


def test_the_readmes_tables_fit_on_a_screen() -> None:
    rows = re.findall(r"^\|.*$", (ROOT / "README.md").read_text(), re.M)
    assert rows and max(map(len, rows)) <= MAX_ROW
