"""A folded `g_s` on a CPU through OpenVINO: torch's result in a tenth to a quarter less time."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov  # type: ignore[import-untyped]
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from models.codec.inference_synthesis import Folded, InverseGDN, SubPixel

CACHE_VARIABLE = "AFTERIMAGE_CACHE_DIR"
"""Names the folder that keeps what was compiled, so that a process starts faster."""
LOCK = "lock"
PRECISION_VARIABLE = "AFTERIMAGE_GS_PRECISION"
"""f32, or bf16 on processors that have it: half the time, and 0.005 dB on six Kodak pictures at
quality 2. Eight bits cost 0.06 dB in the second layer alone, 0.9 dB in all four: not offered."""


class Compiled:
    """Compiled when first called, for as many threads as torch has then; any size, one at a time.

    Not pinned to cores, which API and workers share.
    """

    def __init__(self, net: Folded) -> None:
        self._net = net
        self._request: ov.InferRequest | None = None
        self.lock = threading.Lock()
        """Held by who calls, until the result has been copied: the next call writes over it."""

    def __call__(self, y_hat: Tensor) -> Tensor:
        """`y_hat` (1, M, h, w) on the CPU -> (1, 3, 16h, 16w), valid until the next call."""
        if self._request is None:
            self._request = _compile(self._net).create_infer_request()
        read = y_hat[:, self._net.read].contiguous().numpy()
        made = self._request.infer([read], share_inputs=True, share_outputs=True)
        return torch.from_numpy(made[0])


def graph(net: Folded) -> ov.Model:
    """The network in OpenVINO's operations: (1, C, h, w) -> (1, 3, 16h, 16w)."""
    y_hat = ops.parameter([1, len(net.read), -1, -1], np.float32)
    x: ov.Node = y_hat
    for layer in (*net.head, *net.tail):
        x = _node(layer, x)
    model = ov.Model([ops.result(x)], [y_hat], "g_s")
    # the names that they have else are numbered through the process, and the cache's key has them
    model.input(0).get_tensor().set_names({"y_hat"})
    model.output(0).get_tensor().set_names({"x_hat"})
    return model


def _compile(net: Folded) -> ov.CompiledModel:
    options = {
        # by itself OpenVINO takes bf16 where it can
        "INFERENCE_PRECISION_HINT": os.environ.get(PRECISION_VARIABLE, "f32"),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    folder = _folder()
    if folder is None:
        return ov.Core().compile_model(graph(net), "CPU", options)
    with _alone_in(folder):
        return ov.Core().compile_model(graph(net), "CPU", options | {"CACHE_DIR": str(folder)})


def _folder() -> Path | None:
    """Ours, where there is one that can be written."""
    if CACHE_VARIABLE not in os.environ:
        return None
    folder = Path(os.environ[CACHE_VARIABLE]) / "openvino"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    writable = os.access(folder, os.W_OK) and os.access(folder / LOCK, os.W_OK)
    return folder if writable else None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time. OpenVINO maps a kept file into memory, and writes it in place: who
    reads while a second process writes the same file dies of SIGBUS."""
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _node(layer: nn.Module, x: ov.Node) -> ov.Node:
    if isinstance(layer, InverseGDN):
        return ops.multiply(x, ops.sqrt(_conv(layer.norm, ops.multiply(x, x))))
    if isinstance(layer, SubPixel):
        return ops.depth_to_space(_conv(layer.conv, x), "depth_first", 2)
    assert isinstance(layer, nn.ConvTranspose2d)
    made = ops.convolution_backprop_data(
        x,
        _constant(layer.weight),
        strides=list(layer.stride),
        pads_begin=list(layer.padding),
        pads_end=list(layer.padding),
        dilations=[1, 1],
        output_padding=list(layer.output_padding),
    )
    return ops.add(made, _constant(layer.bias, (1, -1, 1, 1)))


def _conv(layer: nn.Conv2d, x: ov.Node) -> ov.Node:
    padding = list(layer.padding)
    made = ops.convolution(x, _constant(layer.weight), [1, 1], padding, padding, [1, 1])
    return ops.add(made, _constant(layer.bias, (1, -1, 1, 1)))


def _constant(values: Tensor | None, shape: tuple[int, ...] | None = None) -> ov.Node:
    assert values is not None
    array = values.detach().contiguous().numpy()
    return ops.constant(array if shape is None else array.reshape(shape))
