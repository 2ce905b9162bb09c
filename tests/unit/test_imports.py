"""The structure of the source: which way imports run, sizes of modules and functions."""

import ast
import functools
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "worker", "service")
"""Lowest first: a package imports only those before it."""
SERVICE_MAY_USE = (
    "worker.queue",
    "worker.telemetry",
    "worker.settings",
    "worker.webhooks.settings",
)
"""All that the service imports of the worker."""
NO_TORCH = (
    "models.checkpoint", "models.codec.bitstream", "models.codec.catalogue", "models.errors",
    "models.geometry", "models.pictures.decode", "models.pictures.process", "models.tiers",
    "service.schemas",
    "worker.settings", "worker.queue.counters", "worker.queue.estimates", "worker.queue.events",
    "worker.queue.jobs", "worker.queue.object_stores", "worker.queue.outbox",
    "worker.queue.private_redis", "worker.queue.records", "worker.queue.results",
    "worker.queue.store", "worker.queue.targets", "worker.queue.urls", "worker.telemetry.logs",
    "worker.telemetry.tracing", "worker.webhooks.sender", "worker.webhooks.settings",
    "service.cli.main", "service.client",
)  # fmt: skip
MAX_MODULE_LINES, MAX_MEDIAN_LINES = 400, 120
MAX_FUNCTION_LINES, MAX_BRANCHES = 50, 12
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.BoolOp,
    ast.comprehension, ast.match_case, ast.Assert,
)  # fmt: skip


FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
}
"""Of every module of the three packages; a package is `name.__init__`."""


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text("utf-8"))


@functools.cache
def imports(module: str) -> set[str]:
    """Our other modules that this one imports, within functions and for types too."""
    found = set()
    for node in ast.walk(tree(module)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {source(name) for name in names if name.split(".")[0] in PACKAGES}
    return found - {module}


def source(name: str) -> str:
    """The module that `import name` runs, where `name` may be something in a module."""
    parent = name.rpartition(".")[0]
    return next(
        module
        for module in (name, parent, f"{name}.__init__", f"{parent}.__init__")
        if module in FILES
    )


def unit(module: str) -> str:
    """The innermost package of a module; a module directly in a top-level package is a unit."""
    parts = module.split(".")
    return ".".join(parts[:2])


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        pytest.fail(f"imports run in a circle: {' -> '.join(reversed(e.args[1]))}")


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert_no_circle({module: imports(module) for module in FILES})


def test_no_packages_import_each_other_in_a_circle() -> None:
    units: dict[str, set[str]] = {}
    for module in FILES:
        own = unit(module)
        units.setdefault(own, set()).update({unit(name) for name in imports(module)} - {own})
    assert_no_circle(units)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_its_place_allows(module: str) -> None:
    top = module.split(".")[0]
    for name in imports(module):
        assert PACKAGES.index(name.split(".")[0]) <= PACKAGES.index(top), name
        if top == "service" and name.startswith("worker."):
            assert name.startswith(SERVICE_MAY_USE), name
        if module.startswith("service.routes."):
            assert not name.startswith("service.routes."), f"a route imports the route {name}"
        if not module.startswith("models.train."):
            assert not name.startswith("models.train."), name


def test_modules_of_processes_without_a_model_do_not_import_torch() -> None:
    code = f"import sys, {', '.join(NO_TORCH)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", FILES)
def test_no_module_needs_compressai(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            assert not [a for a in node.names if a.name.partition(".")[0] == "compressai"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.partition(".")[0] != "compressai"


def test_bitstreams_are_parsed_without_pillow() -> None:
    code = "import sys, models.codec.bitstream; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_modules_are_short() -> None:
    lines = {
        file: len(file.read_text("utf-8").splitlines())
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert not {file for file, count in lines.items() if count > MAX_MODULE_LINES}
    assert statistics.median(lines.values()) <= MAX_MEDIAN_LINES


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short_and_have_few_branches(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            branches = sum(isinstance(inner, BRANCHES) for inner in ast.walk(node))
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"
            assert branches <= MAX_BRANCHES, f"{node.name}: {branches} branches"
