"""`g_s` on a CPU by OpenVINO: the same result as torch in 10 to 25 % less time."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from models import checked_files, folders
from models.codec.inference_synthesis import (
    InferenceSynthesis,
    InverseGDN,
    ResidualSynthesis,
    SubPixel,
    precision,
)
from models.codec.networks import (
    AttentionBlock,
    ResidualBlock,
    ResidualBlockUpsample,
    ResidualUnit,
)

SLOPE = 0.01
"""Slope of LeakyReLU below 0, PyTorch's default."""
CACHE_VARIABLE = "AFTERIMAGE_CACHE_DIR"
"""Environment variable: the folder in which compiled networks are cached, for faster starts."""


class OpenVinoSynthesis:
    """An `InferenceSynthesis` compiled by OpenVINO, for inputs of any size.

    It is compiled for the number of threads that torch has at that time. Its threads are not pinned
    to cores, because the API and the workers share the cores.
    """

    def __init__(self, net: InferenceSynthesis | ResidualSynthesis) -> None:
        self._channels = net.channels
        self._request = _compile(net).create_infer_request()

    def __call__(self, y_hat: Tensor) -> Tensor:
        """Map y_hat (1, M, h, w) to x_hat (1, 3, 16h, 16w), which is valid until the next call.

        Only one thread may call it at a time.
        """
        used = y_hat[:, self._channels].contiguous().numpy()
        result = self._request.infer([used], share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])


def graph(net: InferenceSynthesis | ResidualSynthesis) -> ov.Model:
    """Build the network as an OpenVINO graph: (1, C, h, w) -> (1, 3, 16h, 16w).

    C is the number of used channels, `len(net.channels)`.
    """
    y_hat = ops.parameter([1, len(net.channels), -1, -1], np.float32)
    x: ov.Node = y_hat
    for layer in (*net.head, *net.tail):
        x = _node(layer, x)
    model = ov.Model([ops.result(x)], [y_hat], "g_s")
    # fixed names: the cache's key contains them, and the default ones depend on a process's history
    model.input(0).get_tensor().set_names({"y_hat"})
    model.output(0).get_tensor().set_names({"x_hat"})
    return model


def _compile(net: InferenceSynthesis | ResidualSynthesis) -> ov.CompiledModel:
    core = ov.Core()
    options = {
        # OpenVINO's default is bf16 on processors that support it
        "INFERENCE_PRECISION_HINT": precision(),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    folder = _cache_folder()
    if folder is None:
        return core.compile_model(graph(net), "CPU", options)
    file = folder / f"{_digest(net, core, options)}.blob"
    cached = checked_files.read(file)
    if cached is not None:
        with contextlib.suppress(RuntimeError):  # OpenVINO does not accept it
            return core.import_model(cached, "CPU", options)
    made = core.compile_model(graph(net), "CPU", options)
    with contextlib.suppress(OSError):
        checked_files.write(file, made.export_model().getvalue())
    return made


def _digest(
    net: InferenceSynthesis | ResidualSynthesis, core: ov.Core, options: Mapping[str, Any]
) -> str:
    """A digest of all that a compiled network depends on: weights, code, versions, processor."""
    cpu = core.get_property("CPU", "FULL_DEVICE_NAME")
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    about = (ov.__version__, cpu, capabilities, options, str(net))
    digest = hashlib.sha256(repr(about).encode())
    digest.update(Path(__file__).read_bytes())  # the graph
    for name, values in (*net.named_parameters(), *net.named_buffers()):
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path | None:
    """Return the folder for compiled networks; None if none is set or it cannot be written.

    Raises `UntrustedFolder` if another user could change it.
    """
    cache = os.environ.get(CACHE_VARIABLE)
    if not cache:
        return None
    folder = Path(cache) / "openvino"
    with contextlib.suppress(OSError):
        folders.private(folder)
    return folder if os.access(folder, os.W_OK) else None


def _node(layer: nn.Module, x: ov.Node) -> ov.Node:
    """Return the OpenVINO node that applies a layer to `x`."""
    if isinstance(layer, nn.Sequential):
        for inner in layer:
            x = _node(inner, x)
        return x
    if isinstance(layer, nn.Conv2d):
        return _conv(layer, x)
    if isinstance(layer, nn.PixelShuffle):
        return ops.depth_to_space(x, "depth_first", layer.upscale_factor)
    if isinstance(layer, nn.ReLU):
        return ops.relu(x)
    if isinstance(layer, nn.ConvTranspose2d):
        return _deconv(layer, x)
    return _block(layer, x)


def _block(layer: nn.Module, x: ov.Node) -> ov.Node:
    if isinstance(layer, InverseGDN):
        return ops.multiply(x, ops.sqrt(_conv(layer.norm, ops.multiply(x, x))))
    if isinstance(layer, SubPixel):
        return ops.depth_to_space(_conv(layer.conv, x), "depth_first", 2)
    if isinstance(layer, ResidualUnit):
        return ops.relu(ops.add(_node(layer.conv, x), x))
    if isinstance(layer, ResidualBlock):
        inner = _leaky(_conv(layer.conv2, _leaky(_conv(layer.conv1, x))))
        return ops.add(inner, x)
    if isinstance(layer, ResidualBlockUpsample):
        inner = _conv(layer.conv, _leaky(_node(layer.subpel_conv, x)))
        return ops.add(_node(layer.igdn, inner), _node(layer.upsample, x))
    assert isinstance(layer, AttentionBlock)
    product = ops.multiply(_node(layer.conv_a, x), ops.sigmoid(_node(layer.conv_b, x)))
    return ops.add(product, x)


def _leaky(x: ov.Node) -> ov.Node:
    return ops.prelu(x, ops.constant(np.array([SLOPE], np.float32)))


def _deconv(layer: nn.ConvTranspose2d, x: ov.Node) -> ov.Node:
    out = ops.convolution_backprop_data(
        x,
        _constant(layer.weight),
        strides=list(layer.stride),
        pads_begin=list(layer.padding),
        pads_end=list(layer.padding),
        dilations=[1, 1],
        output_padding=list(layer.output_padding),
    )
    return ops.add(out, _constant(layer.bias, (1, -1, 1, 1)))


def _conv(layer: nn.Conv2d, x: ov.Node) -> ov.Node:
    padding = list(layer.padding)
    out = ops.convolution(x, _constant(layer.weight), [1, 1], padding, padding, [1, 1])
    return ops.add(out, _constant(layer.bias, (1, -1, 1, 1)))


def _constant(values: Tensor | None, shape: tuple[int, ...] | None = None) -> ov.Node:
    assert values is not None
    array = values.detach().contiguous().numpy()
    return ops.constant(array if shape is None else array.reshape(shape))
