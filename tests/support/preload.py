"""Imports, compiled code and weights that `tests.support.forked`'s server loads before it forks:
what services need, and what most of pytest-xdist's processes import to collect the tests.

Only the fork server imports this module.
"""
# ruff: noqa: E402, F401

import gc
import os
import sys

gc.disable()
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would start a thread

import hypothesis
import numpy as np
import openvino
import playwright.sync_api

import models.evaluate.__main__
import models.train.__main__
import service.cli.api_server
import worker.main
import worker.rq_worker
import worker.tasks
from models.codec import rans
from tests.support import weights


def load_compiled_code() -> None:
    """Load the entropy coder's compiled code from numba's cache, which takes half a second."""
    cdf = np.array([[0, 1 << 15, (1 << 16) - 1, 1 << 16]], np.int32)
    tables = rans.Tables(cdf, np.array([4], np.int32), np.array([0], np.int32))
    symbols = np.zeros((1, 2, 2), np.int32)
    data = rans.encode(symbols, symbols, tables)
    assert (rans.decode(data, symbols, tables) == symbols).all()
    rans.bits(symbols, symbols, tables)


load_compiled_code()
weights.load_all()
gc.freeze()  # a collection in a forked process would copy the memory that it shares
gc.enable()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
