"""LPIPS with AlexNet (Zhang 2018, v0.1) as a loss, from one safetensors file.

Tensor names are those of the package `lpips`; the trainer carries its own copy of the network so
that it also runs where only torch is installed. A test compares the two.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

_STAGES = (
    ("net.slice1.0", 4, 2),  # name, stride, padding
    ("net.slice2.3", 1, 2),
    ("net.slice3.6", 1, 1),
    ("net.slice4.8", 1, 1),
    ("net.slice5.10", 1, 1),
)


class Lpips:
    """Callable distance of two batches of pictures."""

    def __init__(self, file: Path, device: torch.device | None = None) -> None:
        tensors = {k: v.to(device or "cpu") for k, v in load_file(file).items()}
        self.stages = [
            (tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride, padding)
            for name, stride, padding in _STAGES
        ]
        self.linear = [tensors[f"lin{i}.model.1.weight"] for i in range(len(_STAGES))]
        self.shift, self.scale = tensors["scaling_layer.shift"], tensors["scaling_layer.scale"]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """`a`, `b` (B, 3, H, W) in [0, 1] -> distances (B,)."""
        h = ((torch.cat([a, b]) * 2 - 1) - self.shift) / self.scale
        total = torch.zeros(len(a), device=a.device)
        for i, (weight, bias, stride, padding) in enumerate(self.stages):
            if i in (1, 2):
                h = F.max_pool2d(h, 3, 2)
            h = F.relu(F.conv2d(h, weight, bias, stride, padding))
            unit = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            difference = F.conv2d((first - second).square(), self.linear[i])
            total = total + difference.mean((1, 2, 3))
        return total
