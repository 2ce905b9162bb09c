"""`g_s`: latents to the instant picture.

On a CPU, networks of many channels run by Winograd convolutions, others by OpenVINO; on other
devices torch runs them.
"""

import contextlib
import threading
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from models import tiles
from models.codec import winograd
from models.codec.inference_synthesis import for_inference, precision
from models.codec.turns import Turns

Backend = Literal["winograd", "openvino", "torch"]


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
        """Take `g_s` with `M` latent channels for `device` (default: CPU).

        `overlap` is its receptive field in positions of y. The default backend is the fastest one
        that is installed.
        """
        self.device = device or torch.device("cpu")
        self.M, self.overlap, self.backend = M, overlap, backend
        self._g_s = g_s
        self._turns = Turns()

    @cached_property
    def net(self) -> Callable[[Tensor], Tensor]:
        """`g_s` for inference, prepared on first use. Only one thread may use it at a time."""
        net = for_inference(self._g_s).to(self.device).to(memory_format=torch.channels_last)
        backend = self.backend or _fastest(net, self.device)
        if backend == "winograd":
            return winograd.accelerated(net)
        if backend == "torch":
            return net
        from models.codec.openvino_synthesis import OpenVinoSynthesis

        return OpenVinoSynthesis(net)

    def prepare(self) -> None:
        """Begin to prepare `g_s` in a thread, while the first latents are decoded.

        Calls wait for it. If it fails, the first call tries again and raises the error.
        """
        if "net" not in self.__dict__:
            threading.Thread(target=self._prepare).start()

    def _prepare(self) -> None:
        with contextlib.suppress(Exception), self._turns.take(0):
            _ = self.net

    def __call__(self, y_hat: Tensor) -> Tensor:
        """Return x_hat (1, 3, 16h, 16w) in [0, 1] on the CPU, still padded, of y_hat (1, M, h, w).

        Safe to call from several threads, which take turns by windows, the smallest picture first.
        Raises `ValueError` for other shapes, `Canceled` between windows.
        """
        return self._in_windows(y_hat, _clamped, torch.float32)

    def samples(self, y_hat: Tensor) -> Tensor:
        """Return x_hat as samples, (1, 3, 16h, 16w) uint8, rounded, in a quarter of the memory."""
        return self._in_windows(y_hat, _clamped_samples, torch.uint8)

    def _in_windows(
        self, y_hat: Tensor, convert: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Run `g_s` in windows; `convert` copies its output, which the next call overwrites."""
        if y_hat.dim() != 4 or y_hat.shape[:2] != (1, self.M):
            raise ValueError(
                f"y_hat has the shape {tuple(y_hat.shape)}; (1, {self.M}, h, w) is needed"
            )
        size = y_hat.shape[2] * y_hat.shape[3]

        def run(window: Tensor) -> Tensor:
            with self._turns.take(size):
                return convert(self.net(window))

        with torch.inference_mode():
            return tiles.synthesise(run, y_hat.to(self.device), dtype, self.overlap)


def to_samples(x: Tensor) -> Tensor:
    """Convert `x` in [0, 1] to uint8, rounded."""
    return (x * 255).round_().to(torch.uint8)


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def _clamped_samples(x: Tensor) -> Tensor:
    return to_samples(x.clamp(0, 1))


def _fastest(net: nn.Module, device: torch.device) -> Backend:
    """Return the fastest backend for this network and device."""
    if device.type != "cpu":
        return "torch"
    has_openvino = find_spec("openvino") is not None
    if precision() == "bf16" and has_openvino:
        return "openvino"
    if winograd.is_faster(net):
        return "winograd"
    return "openvino" if has_openvino else "torch"
