"""`g_s`: latents to the instant picture, by OpenVINO on a CPU and by torch on other devices."""

import contextlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from models import tiles
from models.codec.inference_synthesis import for_inference

Backend = Literal["openvino", "torch"]


class Synthesis:
    """The codec's synthesis transform. It runs in windows, so its memory use is bounded."""

    def __init__(
        self,
        g_s: nn.Sequential,
        M: int,
        device: torch.device | None = None,
        backend: Backend | None = None,
        overlap: int = tiles.CODEC_OVERLAP,
    ) -> None:
        """Prepare `g_s` with `M` latent channels for `device` (default: CPU).

        `overlap` is its receptive field in positions of y. The default backend is OpenVINO on a
        CPU, if it is installed, otherwise torch.
        """
        self.device = device or torch.device("cpu")
        self.M, self.overlap = M, overlap
        net = for_inference(g_s).to(self.device).to(memory_format=torch.channels_last)
        self.net: Callable[[Tensor], Tensor] = net
        self._lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self.backend = backend or _default_backend(self.device)
        if self.backend == "openvino":
            from models.codec.openvino_synthesis import OpenVinoSynthesis

            self.net = compiled = OpenVinoSynthesis(net)
            self._lock = compiled.lock

    def __call__(self, y_hat: Tensor) -> Tensor:
        """Return x_hat (1, 3, 16h, 16w) in [0, 1] on the CPU, still padded, of y_hat (1, M, h, w).

        Safe to call from several threads. Raises `ValueError` for other shapes.
        """
        if y_hat.dim() != 4 or y_hat.shape[:2] != (1, self.M):
            raise ValueError(
                f"y_hat has the shape {tuple(y_hat.shape)}; (1, {self.M}, h, w) is needed"
            )
        with torch.inference_mode(), self._lock:
            return tiles.synthesise(self.net, y_hat.to(self.device), self.overlap).clamp_(0, 1)


def _default_backend(device: torch.device) -> Backend:
    return "openvino" if device.type == "cpu" and find_spec("openvino") else "torch"
