"""LPIPS (Zhang 2018, v0.1) as a training loss, with AlexNet or VGG-16.

It is reimplemented here, so that training needs neither the package `lpips` nor torchvision. The
tensors in the weights file have the names that `lpips` uses, and these show whether the network is
AlexNet or VGG-16. A test compares the distances with those of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import checkpoint
from models.errors import WeightsError


@dataclass(frozen=True, slots=True)
class _Network:
    """Convolutions of each stage as (name, stride, padding); `pooled` stages begin with pooling."""

    stages: tuple[tuple[tuple[str, int, int], ...], ...]
    pooled: tuple[int, ...]
    window: int  # size of the max pooling; its stride is 2


_ALEX = _Network(
    stages=(
        (("slice1.0", 4, 2),),
        (("slice2.3", 1, 2),),
        (("slice3.6", 1, 1),),
        (("slice4.8", 1, 1),),
        (("slice5.10", 1, 1),),
    ),
    pooled=(1, 2),
    window=3,
)
_VGG = _Network(
    stages=(
        (("slice1.0", 1, 1), ("slice1.2", 1, 1)),
        (("slice2.5", 1, 1), ("slice2.7", 1, 1)),
        (("slice3.10", 1, 1), ("slice3.12", 1, 1), ("slice3.14", 1, 1)),
        (("slice4.17", 1, 1), ("slice4.19", 1, 1), ("slice4.21", 1, 1)),
        (("slice5.24", 1, 1), ("slice5.26", 1, 1), ("slice5.28", 1, 1)),
    ),
    pooled=(1, 2, 3, 4),
    window=2,
)


class LpipsLoss:
    """LPIPS distance between two batches of pictures; differentiable."""

    def __init__(self, file: Path, device: torch.device | None = None) -> None:
        """Load the network from `file`. Raises `WeightsError` if it holds no LPIPS weights."""
        tensors = {k: v.to(device or "cpu") for k, v in checkpoint.read(file)[0].items()}
        self.network = _VGG if "net.slice1.2.weight" in tensors else _ALEX
        try:
            self._read(tensors)
        except KeyError as e:
            raise WeightsError(f"{file}: no LPIPS weights: {e} is missing") from e

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        self.stages = [
            [
                (tensors[f"net.{name}.weight"], tensors[f"net.{name}.bias"], stride, padding)
                for name, stride, padding in stage
            ]
            for stage in self.network.stages
        ]
        self.linear = [tensors[f"lin{i}.model.1.weight"] for i in range(len(self.stages))]
        self.shift, self.scale = tensors["scaling_layer.shift"], tensors["scaling_layer.scale"]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """`a`, `b` (B, 3, H, W) in [0, 1] -> distances (B,)."""
        h = ((torch.cat([a, b]) * 2 - 1) - self.shift) / self.scale
        total = torch.zeros(len(a), device=a.device)
        for i, stage in enumerate(self.stages):
            if i in self.network.pooled:
                h = F.max_pool2d(h, self.network.window, 2)
            for weight, bias, stride, padding in stage:
                h = F.relu(F.conv2d(h, weight, bias, stride, padding))
            unit = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            difference = F.conv2d((first - second).square(), self.linear[i])
            total = total + difference.mean((1, 2, 3))
        return total
