"""Load codecs from shipped and imported weights."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from models import checkpoint
from models.codec import catalogue, rans
from models.codec.bitstream import Metric
from models.codec.catalogue import Installed
from models.codec.codec import Codec
from models.codec.hyperprior import LatentCoder
from models.codec.msh import MeanScaleHyperprior
from models.codec.synthesis import Synthesis
from models.errors import WeightsError

QUALITIES = (1, 2, 3)
"""Qualities for which weights are shipped."""
TABLES = (
    *(f"entropy_bottleneck.{t}" for t in ("_quantized_cdf", "_offset", "_cdf_length")),
    *(f"gaussian_conditional.{t}" for t in ("_quantized_cdf", "_offset", "_cdf_length")),
    "gaussian_conditional.scale_table",
)
"""CDF tables, which CompressAI's `update()` computes from the parameters."""
MAX_LOADED = 2
"""Imported codecs that stay loaded. From quality 5 on, one takes 0.16 GB and 0.4 s to load."""


def from_tensors(tensors: Mapping[str, Tensor], quality: int, metric: Metric = "mse") -> Codec:
    """Build a codec from CompressAI's state dict with its CDF tables.

    N and M are taken from the tensors' shapes. Raises `WeightsError` if tensors are missing or do
    not fit together.
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
        latent_coder = LatentCoder(
            net,
            _tables(tensors, "entropy_bottleneck"),
            _tables(tensors, "gaussian_conditional"),
            tensors["entropy_bottleneck.quantiles"].float()[:, 0, 1],
            tensors["gaussian_conditional.scale_table"].float(),
        )
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else e
        raise WeightsError(f"the tensors do not form a codec of mbt2018-mean: {reason}") from e
    synthesis = Synthesis(net.g_s, net.M)
    return Codec(quality, metric, checkpoint.weights_id(tensors), net, latent_coder, synthesis)


def load(quality: int, metric: Metric = "mse", folder: Path = checkpoint.WEIGHTS) -> Codec:
    """Load the codec of this quality and metric from a folder.

    Raises `WrongWeights` if there is none, `WeightsError` if its file is missing or altered.
    """
    rows = [Installed(e, folder) for e in checkpoint.manifest(folder)]
    row = catalogue.find(rows, quality, metric)
    if row is None:
        raise catalogue.wrong_weights(quality, metric)
    return from_file(row)


def from_file(row: Installed) -> Codec:
    """Load the codec of an entry. Raises `WeightsError` if its file is missing or altered."""
    e = row.entry
    metric: Metric = "mse" if e.metric == "mse" else "ms-ssim"
    return from_tensors(checkpoint.load(e, row.folder), e.quality, metric)


class Imports:
    """The user's imported codecs. Each is loaded on first use; `MAX_LOADED` stay loaded (LRU)."""

    def __init__(self, rows: Sequence[Installed] = ()) -> None:
        self.rows = tuple(rows)
        self._loaded: LRUCache[Installed, Codec] = LRUCache(MAX_LOADED)
        self._lock = threading.Lock()

    def find(self, quality: int, metric: Metric, weights_id: str = "") -> Installed | None:
        """Find the latest import of this quality, metric and, if given, id, without loading it."""
        return catalogue.find(self.rows, quality, metric, weights_id)

    def load(self, row: Installed) -> Codec:
        """Return the codec of one of the rows; safe to call from any thread.

        Raises `WeightsError` if its file is missing or altered.
        """
        with self._lock:
            if row not in self._loaded:
                if len(self._loaded) >= self._loaded.maxsize:
                    self._loaded.popitem()  # frees its memory before the next one is loaded
                self._loaded[row] = from_file(row)
            return self._loaded[row]


def complete_tables(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the CDF tables in a state dict whose part has all of them, none empty.

    The parts are the entropy bottleneck, which codes z, and the Gaussian conditional, for y.
    """
    names: list[str] = []
    for part in ("entropy_bottleneck.", "gaussian_conditional."):
        tables = [name for name in TABLES if name.startswith(part)]
        if all(name in state and state[name].numel() for name in tables):
            names += tables
    return names


def with_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and CDF tables of a CompressAI state dict.

    Complete tables in the state dict are kept unchanged, because only they decode bitstreams that
    were encoded with them. `update()` computes the others, for which `compressai` is imported.
    """
    kept = complete_tables(state)
    if len(kept) == len(TABLES):
        return dict(state)
    net = compressai_model(*state["g_a.6.weight"].shape[:2][::-1])
    weights = {k: v for k, v in state.items() if k not in TABLES}
    net.load_state_dict({**net.state_dict(), **{k: v.float() for k, v in weights.items()}})
    net.update()
    updated = net.state_dict()
    for name in TABLES:
        kind = torch.int32 if "scale" not in name else torch.float32
        weights[name] = state[name] if name in kept else updated[name].to(kind)
    return weights


def compressai_model(N: int, M: int) -> Any:
    """Return CompressAI's `MeanScaleHyperprior`. API and worker never import `compressai`."""
    with warnings.catch_warnings():  # DeprecationWarning from its dependencies
        warnings.simplefilter("ignore")
        from compressai.models import MeanScaleHyperprior as Reference

    return Reference(N, M)


def _check_tables(tensors: Mapping[str, Tensor], net: MeanScaleHyperprior) -> None:
    scales = tensors["gaussian_conditional.scale_table"]
    parts = ("entropy_bottleneck", "gaussian_conditional")
    contexts = [tensors[f"{p}._offset"].numel() for p in parts]
    if contexts != [net.N, scales.numel()]:
        raise ValueError(
            f"there are {contexts[0]} and {contexts[1]} CDFs for z and y; "
            f"{net.N} channels and {scales.numel()} scales need as many"
        )
    if scales.ndim != 1 or not (scales > 0).all() or not (scales.diff() > 0).all():
        raise ValueError("the scale table must hold increasing scales above 0")


def _tables(tensors: Mapping[str, Tensor], part: str) -> rans.Tables:
    cdf, length, offset = (
        tensors[f"{part}.{name}"].to(torch.int32).numpy()
        for name in ("_quantized_cdf", "_cdf_length", "_offset")
    )
    return rans.Tables(cdf, length.reshape(-1), offset.reshape(-1))
