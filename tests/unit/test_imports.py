"""Imports run one way: service -> worker -> models."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"models": {"worker", "service"}, "worker": {"service"}, "service": set[str]()}
STARRED = {
    "worker.costs", "worker.embed", "worker.events", "worker.figures", "worker.jobs", "worker.logs",
    "worker.records", "worker.settings", "worker.store", "worker.tracing", "worker.urls",
    "worker.webhooks",
}  # fmt: skip
"""What the service may import of the worker."""
NO_TORCH = (*STARRED, "models.errors", "models.bitstream", "models.tiers")


def test_imports_run_one_way() -> None:
    for package, forbidden in FORBIDDEN.items():
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{a.name}" for a in node.names]
                for name in names:
                    assert name.split(".")[0] not in forbidden, f"{file} imports {name}"
                    if package == "service" and name.startswith("worker"):
                        assert ".".join(name.split(".")[:2]) in STARRED, f"{file} imports {name}"
                    inside = file.is_relative_to(ROOT / "models/train")
                    assert inside or not name.startswith("models.train"), f"{file} imports {name}"


def test_the_contract_needs_no_torch_and_the_service_no_compressai() -> None:
    code = (
        f"import sys, {', '.join(NO_TORCH)}; assert 'torch' not in sys.modules, 'torch';"
        "import service.app, worker.tasks; assert 'compressai' not in sys.modules, 'compressai'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
