"""The codecs of CompressAI's zoo, as a table: what each codes, and what its networks are made of.

Adding an architecture takes an entry here and, if it needs a new kind of transform, its layers in
`models.codec.networks`.
"""

from dataclasses import dataclass
from typing import Literal

from models.errors import ParameterError

Prior = Literal["factorized", "scale", "mean", "context"]
"""How y is coded: by an entropy bottleneck; by Gaussians with scales, or means and scales, from z;
or by Gaussians whose means and scales also depend on the symbols decoded before."""
ModelName = Literal[
    "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior", "mbt2018-mean",
    "mbt2018", "cheng2020-anchor", "cheng2020-attn",
]  # fmt: skip
"""The architectures, for the API's schema."""
Blocks = Literal["gdn", "relu", "residual", "attention"]
"""The layers of `g_a` and `g_s`."""

DEFAULT: ModelName = "mbt2018-mean"
"""The architecture of the shipped weights and of `.msh` files."""

OVERLAPS: dict[Blocks, int] = {"gdn": 2, "relu": 2, "residual": 7, "attention": 11}
"""Receptive fields in positions of y, rounded up. With 5×5 convolutions of stride 2 that is
(2 + 4 + 8 + 16) / 16 in the analysis and 1 + 1/2 + 1/4 + 1/8 in the synthesis. Residual blocks have
57/16 and 2 + 1 + 1/2 + 1 + 1/2 + 1/4 + 1/2 + 1/4 + 1/8 + 1/4 + 1/8 = 6.5. Each attention block adds
3 positions at its own resolution: 3 + 3/4 in the synthesis, where it is local, too."""

_SMALL, _LARGE = (128, 192), (192, 320)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture under CompressAI's name. `channels` holds N and M by quality, from 1."""

    name: str
    prior: Prior
    blocks: Blocks
    channels: tuple[tuple[int, int], ...]
    effort: float = 1  # time of a decode, relative to the shipped mbt2018-mean; a guess
    published: str = ""  # the model whose weights CompressAI's zoo loads under this name

    @property
    def strings(self) -> tuple[str, ...]:
        """The entropy-coded strings of a file, in their order."""
        return ("y",) if self.prior == "factorized" else ("y", "z")

    @property
    def overlap(self) -> int:
        """Margin of a window of `g_a` or `g_s` in positions of y: their receptive field."""
        return OVERLAPS[self.blocks]

    @property
    def autoregressive(self) -> bool:
        """Whether each position of y depends on the positions before it."""
        return self.prior == "context"

    @property
    def qualities(self) -> int:
        """The highest quality; the lowest is 1."""
        return len(self.channels)


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("bmshj2018-factorized", "factorized", "gdn", (_SMALL,) * 5 + (_LARGE,) * 3),
        Architecture(
            "bmshj2018-factorized-relu", "factorized", "relu", (_SMALL,) * 5 + (_LARGE,) * 3,
            published="bmshj2018-factorized",
        ),
        Architecture("bmshj2018-hyperprior", "scale", "gdn", (_SMALL,) * 5 + (_LARGE,) * 3),
        Architecture("mbt2018-mean", "mean", "gdn", (_SMALL,) * 4 + (_LARGE,) * 4),
        Architecture("mbt2018", "context", "gdn", ((192, 192),) * 4 + (_LARGE,) * 4, effort=5),
        Architecture(
            "cheng2020-anchor", "context", "residual", ((128, 128),) * 3 + ((192, 192),) * 3,
            effort=8,
        ),
        Architecture(
            "cheng2020-attn", "context", "attention", ((128, 128),) * 3 + ((192, 192),) * 3,
            effort=9,
        ),
    )
}  # fmt: skip


def find(name: str) -> Architecture:
    """Return the architecture with this name. Raises `ParameterError` if there is none."""
    if name not in ARCHITECTURES:
        raise ParameterError(f"unknown model {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def channels(name: str, quality: int) -> tuple[int, int]:
    """Return the channels N and M of a quality; they are the same for both metrics.

    Raises `ParameterError` for an unknown architecture or quality.
    """
    architecture = find(name)
    if not 1 <= quality <= architecture.qualities:
        raise ParameterError(
            f"quality is {quality}; {name} has the qualities 1 to {architecture.qualities}"
        )
    return architecture.channels[quality - 1]
