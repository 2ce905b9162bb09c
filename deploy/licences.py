"""Print deploy/LICENCES.md, the licences of the packages in the image: `make lock` runs it."""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from models import checkpoint

DEPLOY = Path(__file__).parent


def licence(name: str) -> str:
    """The licence from a package's metadata; "not said" if there is none, or the package is not
    installed (some are for other Python versions only)."""
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        return "not said"
    classifiers = [
        c.rpartition(" :: ")[2] for c in fields.get_all("Classifier", []) if c.startswith("License")
    ]
    text = fields.get("License-Expression") or ", ".join(classifiers) or fields.get("License", "")
    return text.strip().splitlines()[0].replace("|", "/") if text.strip() else "not said"


def main() -> None:
    lock = (DEPLOY / "requirements-cpu.lock").read_text()
    rows = []
    for name, version in re.findall(r"^([\w.-]+)==([^ ]+)", lock, re.M):
        rows.append(f"| {name} | {version} | {licence(name)} |")
    weights = [f"| {e.file} | {e.weights_id} | Apache-2.0 |" for e in checkpoint.manifest()]
    print(  # noqa: T201
        "# Licences\n\n"
        "Afterimage is under Apache-2.0. The packages in its image, with the licences that their "
        "metadata state:\n\n"
        "| package | version | licence |\n|---|---|---|",
        *rows,
        "\nThe weights were trained for this project; their model cards are in "
        "`models/weights/`:\n\n"
        "| file | id | licence |\n|---|---|---|",
        *weights,
        "\nThe sample photographs of the web page (`service/web/samples`) are from Kodak: free for "
        "unrestricted use.\n\n"
        "The pristine model of NIQE is from the University of Texas at Austin: "
        "`models/evaluate/niqe_pristine.LICENSE`.",
        sep="\n",
    )


if __name__ == "__main__":
    main()
