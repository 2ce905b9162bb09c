"""`g_s`: latents to the instant picture, by OpenVINO on a CPU, by torch on other devices."""

import contextlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from models import tiles
from models.codec.inference_synthesis import Folded

Backend = Literal["openvino", "torch"]


class Synthesis:
    """The codec's own decoder, in windows: memory is bounded."""

    def __init__(
        self,
        g_s: nn.Sequential,
        M: int,
        device: torch.device | None = None,
        backend: Backend | None = None,
    ) -> None:
        """On a CPU, the default, torch serves where OpenVINO is not installed."""
        self.device = device or torch.device("cpu")
        self.M = M
        net = Folded(g_s).to(self.device).to(memory_format=torch.channels_last)
        self.net: Callable[[Tensor], Tensor] = net
        self._alone: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self.backend = backend or _backend(self.device)
        if self.backend == "openvino":
            from models.codec.openvino_synthesis import Compiled

            self.net = compiled = Compiled(net)
            self._alone = compiled.lock

    def __call__(self, y_hat: Tensor) -> Tensor:
        """`y_hat` (1, M, h, w) -> image (1, 3, 16h, 16w) in [0, 1] on the CPU, still padded.

        Raises `ValueError` unless `y_hat` has M channels.
        """
        if y_hat.dim() != 4 or y_hat.shape[:2] != (1, self.M):
            raise ValueError(f"y_hat of shape {tuple(y_hat.shape)}; (1, {self.M}, h, w) is needed")
        with torch.inference_mode(), self._alone:
            return tiles.synthesise(self.net, y_hat.to(self.device)).clamp_(0, 1)


def _backend(device: torch.device) -> Backend:
    return "openvino" if device.type == "cpu" and find_spec("openvino") else "torch"
