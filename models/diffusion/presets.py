"""Which U-Nets there are: the paper's, and the compact ones that a CPU can run."""

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Sizes and habits of a network.

    Levels are listed finest first, each half as fine as the one before; `latents` is the codec's M.
    """

    preset: Literal["compact", "paper"]
    patch: int  # pixels a side that the finest level folds into channels
    widths: tuple[int, ...]  # channels of the levels
    down: tuple[int, ...]  # residual blocks on the way down
    up: tuple[int, ...]  # residual blocks on the way up
    embedding: int
    latents: int = 192
    qualities: int = 0  # highest quality that the network is told; 0: none, nor beta
    condition: tuple[int, ...] = ()  # channels of the maps
    depth: int = 2  # residual blocks per scale of the conditioner
    attention: tuple[int, ...] = ()  # levels
    prediction: Literal["v", "eps"] = "v"
    target: Literal["residual", "image"] = "residual"
    learned_variance: bool = False
    smooth: int = 0  # channels of the convolutions on whole pixels, behind the last shuffle

    @property
    def map_strides(self) -> tuple[int, ...]:
        """Pixels between two positions of each map, finest first; the compact ones begin at 4."""
        finest = 1 if self.preset == "paper" else 4
        return tuple(finest << i for i in range(len(self.condition)))

    @property
    def halo(self) -> int:
        """Pixels that an output depends on beyond its own position, on each side.

        For `paper`, whose attention and group norm see everything, a choice instead of a bound.
        """
        if self.preset == "paper":
            return 96
        blocks = zip(self.down, self.up, strict=True)
        folded = 2 + sum((d + u) * 2 << level for level, (d, u) in enumerate(blocks))
        return self.patch * folded + (2 if self.smooth else 0)


COMPACT = UNetConfig(
    preset="compact",
    patch=4,
    widths=(96, 128, 160),
    down=(1, 1, 1),
    up=(2, 1, 0),
    embedding=128,
    qualities=8,
    condition=(96, 128, 160),
    smooth=16,
)
"""Shipped: residual diffusion with v-prediction, for the CPU."""
FINE = UNetConfig(
    preset="compact",
    patch=2,
    widths=(48, 96, 160, 224),
    down=(1, 1, 1, 1),
    up=(1, 1, 1, 0),
    embedding=128,
    qualities=8,
    condition=(96, 160, 224),
)
"""The compact preset's other size: one level more, a quarter more work a step."""
PAPER = UNetConfig(
    preset="paper",
    patch=1,
    widths=(128, 256, 256, 384, 384),
    down=(3, 3, 3, 3, 3),
    up=(4, 4, 4, 4, 4),
    embedding=512,
    condition=(128, 128, 256, 256),
    attention=(3, 4),
    prediction="eps",
    target="image",
    learned_variance=True,
)
"""The paper's: 113.2 million parameters, epsilon-prediction and learned variance on the image."""
PRESETS = {"compact": COMPACT, "fine": FINE, "paper": PAPER}


def from_json(text: str) -> UNetConfig:
    """The configuration whose `dataclasses.asdict` was written as JSON.

    Raises `ValueError` or `TypeError` where it is none.
    """
    fields = json.loads(text)
    own: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return UNetConfig(**own)
