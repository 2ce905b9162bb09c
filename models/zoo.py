"""Which codec for which quality: shipped weights by manifest, and conversion from CompressAI."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint, rans
from models.bitstream import Metric
from models.codec import Codec
from models.errors import WeightsError, WrongWeights
from models.hyperprior import Hyperprior
from models.msh import MeanScaleHyperprior
from models.synthesis import Synthesis

_TABLES = ("._quantized_cdf", "._offset", "._cdf_length", ".scale_table")
QUALITIES = (1, 2, 3)
"""Qualities whose weights are shipped."""


def from_tensors(tensors: Mapping[str, Tensor], quality: int, metric: Metric = "mse") -> Codec:
    """CompressAI's state dict *with* its CDF buffers -> a codec; N and M are read from it.

    Raises `WeightsError` where tensors are missing or their shapes disagree.
    """
    try:
        m, n = tensors["g_a.6.weight"].shape[:2]
        net = MeanScaleHyperprior(n, m)
        parts = ("g_a.", "g_s.", "h_a.", "h_s.")
        state = {
            k: v.float()
            for k, v in tensors.items()
            if k.startswith(parts) and not k.endswith(("_reparam.pedestal", ".bound", ".pedestal"))
        }
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        hyperprior = Hyperprior(
            net,
            _tables(tensors, "entropy_bottleneck"),
            _tables(tensors, "gaussian_conditional"),
            tensors["entropy_bottleneck.quantiles"].float()[:, 0, 1],
            tensors["gaussian_conditional.scale_table"].float(),
        )
    except (KeyError, RuntimeError, ValueError) as e:
        raise WeightsError(f"no mean-scale hyperprior: {e}") from e
    synthesis = Synthesis(net.g_s, net.M)
    return Codec(quality, metric, checkpoint.weights_id(tensors), net, hyperprior, synthesis)


def load(quality: int, metric: Metric = "mse", folder: Path = checkpoint.WEIGHTS) -> Codec:
    """The shipped codec of this quality and metric; `WrongWeights` where there is none."""
    for entry in checkpoint.manifest(folder):
        if (entry.kind, entry.quality, entry.metric) == ("codec", quality, metric):
            return from_tensors(checkpoint.load(entry, folder), quality, metric)
    raise WrongWeights(f"no weights for quality {quality}, metric {metric} are installed")


def with_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CompressAI state dict -> its parameters with the tables that its `update()` makes.

    Needs `compressai`, which the running service does not import.
    """
    from compressai.models import (  # type: ignore[import-untyped]
        MeanScaleHyperprior as Reference,
    )

    m, n = state["g_a.6.weight"].shape[:2]
    reference = Reference(n, m)
    reference.update()
    weights = {k: v for k, v in state.items() if not k.endswith(_TABLES)}
    floats = {k: v.float() for k, v in weights.items()}
    reference.load_state_dict({**reference.state_dict(), **floats})
    reference.update(force=True)
    for name, value in reference.state_dict().items():
        if name.endswith(_TABLES):
            weights[name] = value.to(torch.int32) if "scale" not in name else value.float()
    return weights


def _tables(tensors: Mapping[str, Tensor], part: str) -> rans.Tables:
    cdf, length, offset = (
        tensors[f"{part}.{name}"].to(torch.int32).numpy()
        for name in ("_quantized_cdf", "_cdf_length", "_offset")
    )
    return rans.Tables(cdf, length.reshape(-1), offset.reshape(-1))
