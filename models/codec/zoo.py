"""Which codec for which quality: shipped and imported weights, as codecs that run."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import checkpoint
from models.codec import catalogue, rans
from models.codec.bitstream import Metric
from models.codec.catalogue import Installed
from models.codec.codec import Codec
from models.codec.hyperprior import Hyperprior
from models.codec.msh import MeanScaleHyperprior
from models.codec.synthesis import Synthesis
from models.errors import WeightsError

QUALITIES = (1, 2, 3)
"""Qualities whose weights are shipped."""
TABLES = (
    *(f"entropy_bottleneck.{t}" for t in ("_quantized_cdf", "_offset", "_cdf_length")),
    *(f"gaussian_conditional.{t}" for t in ("_quantized_cdf", "_offset", "_cdf_length")),
    "gaussian_conditional.scale_table",
)
"""What CompressAI's `update()` makes of the parameters."""
KEPT = 2
"""Imported codecs that stay loaded: from quality 5 one takes 0.16 GB, and 0.4 s to load."""


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
            if k.startswith(parts) and not k.endswith((".bound", ".pedestal"))
        }
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        _check_tables(tensors, net)
        hyperprior = Hyperprior(
            net,
            _tables(tensors, "entropy_bottleneck"),
            _tables(tensors, "gaussian_conditional"),
            tensors["entropy_bottleneck.quantiles"].float()[:, 0, 1],
            tensors["gaussian_conditional.scale_table"].float(),
        )
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        raise WeightsError(f"no mean-scale hyperprior: {e}") from e
    synthesis = Synthesis(net.g_s, net.M)
    return Codec(quality, metric, checkpoint.weights_id(tensors), net, hyperprior, synthesis)


def load(quality: int, metric: Metric = "mse", folder: Path = checkpoint.WEIGHTS) -> Codec:
    """The codec of this quality and metric in a folder; `WrongWeights` where there is none."""
    rows = [Installed(e, folder) for e in checkpoint.manifest(folder)]
    found = catalogue.find(rows, quality, metric)
    if found is None:
        raise catalogue.wrong_weights(quality, metric)
    return from_file(found)


def from_file(row: Installed) -> Codec:
    """The codec that an entry names; `WeightsError` where its file is missing or altered."""
    e = row.entry
    metric: Metric = "mse" if e.metric == "mse" else "ms-ssim"
    return from_tensors(checkpoint.load(e, row.folder), e.quality, metric)


class Imports:
    """The user's codecs: each is loaded when it is first needed, the last `KEPT` stay."""

    def __init__(self, rows: Sequence[Installed] = ()) -> None:
        self.rows = tuple(rows)
        self._loaded: dict[Installed, Codec] = {}  # the last used last
        self._lock = threading.Lock()

    def find(self, quality: int, metric: Metric, weights_id: str = "") -> Installed | None:
        """What was imported as this quality and metric, last or as `weights_id`; not loaded."""
        return catalogue.find(self.rows, quality, metric, weights_id)

    def load(self, row: Installed) -> Codec:
        """The codec of one of the rows; safe to call from any thread. Raises `WeightsError`."""
        with self._lock:
            if row not in self._loaded and len(self._loaded) >= KEPT:
                del self._loaded[next(iter(self._loaded))]
            found = self._loaded.pop(row, None) or from_file(row)
            self._loaded[row] = found
            return found


def with_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CompressAI state dict -> its parameters and tables.

    Tables that it brings along are kept as they are, since only they decode what was encoded with
    them; else they are made as `update()` makes them, which needs `compressai`.
    """
    if all(name in state and state[name].numel() for name in TABLES):
        return dict(state)
    net = reference(*state["g_a.6.weight"].shape[:2][::-1])
    weights = {k: v for k, v in state.items() if k not in TABLES}
    net.load_state_dict({**net.state_dict(), **{k: v.float() for k, v in weights.items()}})
    net.update()
    made = net.state_dict()
    for name in TABLES:
        weights[name] = made[name].to(torch.int32) if "scale" not in name else made[name].float()
    return weights


def reference(N: int, M: int) -> Any:
    """CompressAI's own `MeanScaleHyperprior`; the running service does not import it."""
    with warnings.catch_warnings():  # its dependencies deprecate each other
        warnings.simplefilter("ignore")
        from compressai.models import MeanScaleHyperprior as Reference  # type: ignore[import-untyped]

    return Reference(N, M)


def _check_tables(tensors: Mapping[str, Tensor], net: MeanScaleHyperprior) -> None:
    scales = tensors["gaussian_conditional.scale_table"]
    parts = ("entropy_bottleneck", "gaussian_conditional")
    contexts = [tensors[f"{p}._offset"].numel() for p in parts]
    if contexts != [net.N, scales.numel()]:
        raise ValueError(f"{contexts} CDFs for {net.N} channels and {scales.numel()} scales")
    if scales.ndim != 1 or not (scales > 0).all() or not (scales.diff() > 0).all():
        raise ValueError("the scale table does not rise from above 0")


def _tables(tensors: Mapping[str, Tensor], part: str) -> rans.Tables:
    cdf, length, offset = (
        tensors[f"{part}.{name}"].to(torch.int32).numpy()
        for name in ("_quantized_cdf", "_cdf_length", "_offset")
    )
    return rans.Tables(cdf, length.reshape(-1), offset.reshape(-1))
