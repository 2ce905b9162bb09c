"""State dicts of CompressAI's networks: their names and shapes, and what tells one from another."""

import functools
import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from models.codec import architectures, tables, zoo
from models.codec.architectures import Architecture
from models.codec.context import SIZE, TAPS
from models.codec.hyperprior import SCALE_MIN
from models.codec.msh import GDN
from models.codec.networks import Network

_FILTERS = (1, 3, 3, 3, 3, 1)
"""Layer widths of the factorised prior of z (the network for its cumulative distribution)."""


@functools.lru_cache(maxsize=32)
def parameters(model: str, N: int, M: int) -> Mapping[str, tuple[int, ...]]:
    """Return names and shapes of all parameters of a model, as CompressAI has them."""
    architecture = architectures.find(model)
    with torch.device("meta"):
        transforms = Network(architecture, N, M).state_dict()
    shapes = {name: tuple(value.shape) for name, value in transforms.items()}
    coded = M if architecture.prior == "factorized" else N
    shapes[f"{tables.Z}.quantiles"] = (coded, 1, 3)
    for i, (inputs, outputs) in enumerate(pairwise(_FILTERS)):
        shapes[f"{tables.Z}.matrices.{i}"] = (coded, outputs, inputs)
        shapes[f"{tables.Z}.biases.{i}"] = (coded, outputs, 1)
        if i < len(_FILTERS) - 2:
            shapes[f"{tables.Z}.factors.{i}"] = (coded, outputs, 1)
    return shapes


def detect(state: Mapping[str, Tensor]) -> str:
    """Return the model that a state dict is of, by its names and shapes.

    It is `mbt2018-mean` if nothing speaks for another.
    """
    if any(name.startswith("g_a.0.conv1.") for name in state):
        attention = any(".conv_a." in name for name in state)
        return "cheng2020-attn" if attention else "cheng2020-anchor"
    if "context_prediction.weight" in state:
        return "mbt2018"
    if not any(name.startswith(("h_a.", "h_s.")) for name in state):
        has_gdn = any(name.endswith((".beta", ".gamma")) for name in state)
        return "bmshj2018-factorized" if has_gdn else "bmshj2018-factorized-relu"
    last, latents = state.get("h_s.4.weight"), state.get("g_a.6.weight")
    if last is not None and latents is not None and len(last) == len(latents):
        return "bmshj2018-hyperprior"
    return architectures.DEFAULT


def to_compressai(
    tensors: Mapping[str, Tensor], model: str = architectures.DEFAULT
) -> dict[str, Tensor]:
    """Convert a codec's tensors to a state dict for CompressAI's network of the model."""
    floats = {k: v if k in zoo.TABLES else v.float() for k, v in tensors.items()}
    return floats | _constants(architectures.find(model), *zoo.widths(tensors))


def _constants(architecture: Architecture, N: int, M: int) -> dict[str, Tensor]:
    """Return the buffers in CompressAI's state dict that are the same in every checkpoint."""
    with torch.device("meta"):
        net = Network(architecture, N, M)
    target = math.log(2 / 1e-9 - 1)
    values: dict[str, list[float]] = {
        f"{tables.Z}.target": [-target, 0, target],
        f"{tables.Z}.likelihood_lower_bound.bound": [1e-9],
    }
    if architecture.prior != "factorized":
        values |= {
            f"{tables.Y}.likelihood_lower_bound.bound": [1e-9],
            f"{tables.Y}.lower_bound_scale.bound": [SCALE_MIN],
            f"{tables.Y}.scale_bound": [SCALE_MIN],
        }
    for name, module in net.named_modules():
        if isinstance(module, GDN):
            for part, least in (("beta", GDN.BETA_MIN), ("gamma", 0.0)):
                values[f"{name}.{part}_reparam.pedestal"] = [GDN.PEDESTAL]
                bound = (least + GDN.PEDESTAL) ** 0.5
                values[f"{name}.{part}_reparam.lower_bound.bound"] = [bound]
    constants = {name: torch.tensor(value) for name, value in values.items()}
    if architecture.autoregressive:
        mask = torch.arange(SIZE**2).reshape(SIZE, SIZE) < TAPS
        constants["context_prediction.mask"] = mask.float().expand(2 * M, M, -1, -1).contiguous()
    return constants
