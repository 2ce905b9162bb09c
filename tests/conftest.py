"""What all tests share: their environment, order and processes. `tests.support.fixtures` has the
fixtures."""
# ruff: noqa: E402

import gc

gc.disable()  # until the tests are collected: imports take a fifth less time

import tempfile
from pathlib import Path

import pytest

from tests.support import compressai as reference
from tests.support import gateways, scheduling


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment of the tests, and load the fixtures where tests will run."""
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist inherit the environment
        _set_environment(config)
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.support.fixtures")


def _set_environment(config: pytest.Config) -> None:
    """Hide the user's imported weights, let workers have their share of the processor, let all CPUs
    draw the same pictures, and let all processes of all runs share what numba compiled, which takes
    4 s.

    With the default niceness, a worker waits for the tests that run in parallel. numba compiles
    again what belongs to another version of the source, of itself or of the CPU.
    """
    folder = tempfile.TemporaryDirectory(prefix="afterimage-tests-")
    config.add_cleanup(folder.cleanup)
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    numba = cache.mkdir("numba") if cache else Path(folder.name, "numba")
    patch.setenv("NUMBA_CACHE_DIR", str(numba))
    patch.setenv("AFTERIMAGE_WEIGHTS_DIR", str(Path(folder.name, "no-weights")))
    patch.setenv("AFTERIMAGE_NICE", "0")
    patch.setenv("AFTERIMAGE_DIFFUSION_PRECISION", "f32")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Fork the processes of pytest-xdist. To measure coverage, each has to import what it tests."""
    if not config.getoption("cov_source", None):
        config.add_cleanup(gateways.fork())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep the tests of each file, and of each shared service, in one process."""
    return scheduling.scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest; deselect those that need CompressAI if it is not for
    this Python."""
    reference.deselect(config, items)
    items.sort(key=lambda item: scheduling.rank(item.nodeid))  # stable: files stay together


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collections, which take half a second each."""
    gc.freeze()
    gc.enable()


def pytest_report_header() -> str:
    """Say which tests are left out."""
    return "" if reference.AVAILABLE else reference.REASON
