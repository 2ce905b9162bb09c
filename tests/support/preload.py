"""What the fork server of `tests.support.forked` imports and compiles before it forks processes.

Only the fork server imports this module. OpenVINO is left out: its import starts a thread.
"""
# ruff: noqa: F401

import os

import numpy as np

import service.cli.api_server
import worker.main
import worker.rq_worker
import worker.tasks
from models.codec import rans


def load_compiled_code() -> None:
    """Load the entropy coder's compiled code from numba's cache, which takes half a second."""
    cdf = np.array([[0, 1 << 15, (1 << 16) - 1, 1 << 16]], np.int32)
    tables = rans.Tables(cdf, np.array([4], np.int32), np.array([0], np.int32))
    symbols = np.zeros((1, 2, 2), np.int32)
    data = rans.encode(symbols, symbols, tables)
    assert (rans.decode(data, symbols, tables) == symbols).all()
    rans.bits(symbols, symbols, tables)


load_compiled_code()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
