"""U-Net configurations: the paper's, and the compact ones for the CPU."""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Layer sizes and training target of a U-Net.

    Levels are listed finest first; each has half the resolution of the one before.
    """

    preset: Literal["compact", "paper"]
    patch: int  # side in pixels of the blocks that the finest level turns into channels
    widths: tuple[int, ...]  # channels of the levels
    down: tuple[int, ...]  # residual blocks on the way down
    up: tuple[int, ...]  # residual blocks on the way up
    embedding: int
    latents: int = 192  # channels of `y_hat`, the codec's M
    qualities: int = 0  # highest quality; 0: the network is conditioned on neither quality nor beta
    condition: tuple[int, ...] = ()  # channels of the feature maps
    depth: int = 2  # residual blocks per scale of the conditioner
    attention: tuple[int, ...] = ()  # levels with attention
    prediction: Literal["v", "eps"] = "v"
    target: Literal["residual", "image"] = "residual"
    learned_variance: bool = False
    smooth: int = 0  # channels of the full-resolution convolutions at the end; 0: none

    @property
    def map_strides(self) -> tuple[int, ...]:
        """Stride in pixels of each feature map, finest first."""
        finest = 1 if self.preset == "paper" else 4
        return tuple(finest << i for i in range(len(self.condition)))

    @property
    def halo(self) -> int:
        """Radius in pixels of the denoiser's receptive field.

        `paper` has no bound, because its attention and group norm read the whole picture. Its 96 is
        a compromise.
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
"""The shipped network of the posterior tiers: residual diffusion with v-prediction, for the CPU."""
SMALL = replace(
    COMPACT, widths=(64, 96, 128), condition=(64, 96, 128), depth=1, down=(1, 1, 1), up=(1, 1, 0)
)
"""The shipped network of the tier `perceptual`, for one call: two fifths of `COMPACT`'s work."""
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
"""A larger compact network: one more level, 25 % more work per step."""
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
"""The paper's network: 113.2 million parameters. It denoises the picture itself, not a residual,
and predicts epsilon and the variance."""
PRESETS = {"compact": COMPACT, "small": SMALL, "fine": FINE, "paper": PAPER}


def from_json(text: str) -> UNetConfig:
    """Read a configuration from the JSON of its `dataclasses.asdict`.

    Raises `ValueError` or `TypeError` if `text` is not a configuration.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise TypeError(f"{text:.40}: not a JSON object")
    arguments: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return UNetConfig(**arguments)
