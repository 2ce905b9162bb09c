"""`g_s`: latents to the instant picture."""

import torch
from torch import Tensor, nn

from models import tiles


class Synthesis:
    """The codec's own decoder, in torch on the CPU, in tiles: memory is bounded."""

    def __init__(self, g_s: nn.Sequential, M: int) -> None:
        self.g_s = g_s.to(memory_format=torch.channels_last)
        self.M = M

    def __call__(self, y_hat: Tensor) -> Tensor:
        """`y_hat` (1, M, h, w) -> image (1, 3, 16h, 16w) in [0, 1], still padded.

        Raises `ValueError` unless `y_hat` has M channels.
        """
        if y_hat.dim() != 4 or y_hat.shape[:2] != (1, self.M):
            raise ValueError(f"y_hat of shape {tuple(y_hat.shape)}; (1, {self.M}, h, w) is needed")
        with torch.inference_mode():
            return tiles.synthesise(self.g_s, y_hat).clamp_(0, 1)
