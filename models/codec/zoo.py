"""Load codecs from shipped and imported weights."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from cachetools import LRUCache
from torch import Tensor

from models import checkpoint
from models.codec import architectures, catalogue, rans, tables
from models.codec.autoregressive import ContextCoder
from models.codec.bitstream import Metric
from models.codec.catalogue import Installed
from models.codec.codec import Codec
from models.codec.hyperprior import FactorizedCoder, LatentCoder
from models.codec.networks import Network
from models.codec.synthesis import Synthesis
from models.errors import WeightsError

QUALITIES = (1, 2, 3)
"""Qualities for which weights are shipped."""
TABLES = (*tables.names(tables.Z), *tables.names(tables.Y))
"""CDF tables, which CompressAI's `update()` computes from the parameters."""
MAX_LOADED = 2
"""Imported codecs that stay loaded. From quality 5 on, one takes 0.16 GB and 0.4 s to load, and as
much memory again once it has decoded, for the matrices of its convolutions."""


def from_tensors(
    tensors: Mapping[str, Tensor],
    quality: int,
    metric: Metric = "mse",
    model: str = architectures.DEFAULT,
) -> Codec:
    """Build a codec from CompressAI's state dict with its CDF tables.

    N and M are taken from the tensors' shapes. Raises `WeightsError` if tensors are missing or do
    not fit together.
    """
    architecture = architectures.find(model)
    try:
        with torch.device("meta"):  # random parameters would take a third of the loading time
            net = Network(architecture, *widths(tensors))
        names = net.state_dict().keys()
        net.load_state_dict({k: _copy(tensors[k]) for k in tensors if k in names}, assign=True)
        net.eval().requires_grad_(False)
        _check_tables(tensors, net)
        latent_coder = _latent_coder(net, tensors)
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else e
        raise WeightsError(f"the tensors do not form a codec of {model}: {reason}") from e
    synthesis = Synthesis(net.g_s, net.M, overlap=architecture.overlap)
    return Codec(
        quality, metric, checkpoint.weights_id(tensors), net, latent_coder, synthesis, model
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def widths(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the channels N and M of a state dict. Raises `KeyError` if it has no `g_a`."""
    if "g_a.6.weight" in tensors and "g_a.0.weight" in tensors:
        m, n = tensors["g_a.6.weight"].shape[:2]
        return n, m
    n = tensors["g_a.0.conv1.weight"].shape[0]
    return n, n


def _latent_coder(net: Network, tensors: Mapping[str, Tensor]) -> LatentCoder:
    medians = tensors[f"{tables.Z}.quantiles"].float()[:, 0, 1]
    z_tables = _tables(tensors, tables.Z)
    if net.architecture.prior == "factorized":
        return FactorizedCoder(net, z_tables, medians)
    kind = ContextCoder if net.architecture.autoregressive else LatentCoder
    y_tables = _tables(tensors, tables.Y)
    return kind(net, z_tables, y_tables, medians, tensors[f"{tables.Y}.scale_table"].float())


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
    return from_tensors(checkpoint.load(e, row.folder), e.quality, metric, catalogue.model_of(e))


class Shipped(Mapping[tuple[int, Metric], Codec]):
    """The shipped codecs by quality and metric. Each is loaded on first use, and stays loaded."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[int, Metric], Codec] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[int, Metric]) -> Codec:
        """Return a codec; safe to call from any thread.

        Raises `WeightsError` if its file is missing or altered.
        """
        if key not in self:
            raise KeyError(key)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load(*key)
            return self._loaded[key]

    def __contains__(self, key: object) -> bool:
        return key in set(self)

    def __iter__(self) -> Iterator[tuple[int, Metric]]:
        return ((quality, "mse") for quality in QUALITIES)

    def __len__(self) -> int:
        return len(QUALITIES)


class Imports:
    """The user's imported codecs. Each is loaded on first use; `MAX_LOADED` stay loaded (LRU)."""

    def __init__(self, rows: Sequence[Installed] = ()) -> None:
        self.rows = tuple(rows)
        self._loaded: LRUCache[Installed, Codec] = LRUCache(MAX_LOADED)
        self._lock = threading.Lock()

    def find(
        self, quality: int, metric: Metric, weights_id: str = "", model: str = architectures.DEFAULT
    ) -> Installed | None:
        """Find the latest import as `catalogue.find` does, without loading it."""
        return catalogue.find(self.rows, quality, metric, weights_id, model)

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


def table_names(state: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all tables that a state dict with these parameters needs."""
    has_z = any(name.startswith("h_s.") for name in state)
    return TABLES if has_z else tables.names(tables.Z)


def complete_tables(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the CDF tables in a state dict whose part has all of them, none empty.

    The parts are the entropy bottleneck, which codes z, and the Gaussian conditional, for y.
    """
    names: list[str] = []
    for part in (tables.Z, tables.Y):
        of_part = tables.names(part)
        if all(name in state and state[name].numel() for name in of_part):
            names += of_part
    return names


def with_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and CDF tables of a CompressAI state dict.

    Complete tables in the state dict are kept unchanged, because only they decode bitstreams that
    were encoded with them. Others are computed. Raises `WeightsError` if the parameters give none.
    """
    kept, needed = complete_tables(state), table_names(state)
    result = {k: v for k, v in state.items() if k not in TABLES}
    missing = [name for name in needed if name not in kept]
    try:
        floats = {k: v.float() for k, v in state.items() if k.startswith(tables.Z)}
        computed = tables.factorized(floats) if tables.names(tables.Z)[0] in missing else {}
    except ValueError as e:
        raise WeightsError(f"the entropy bottleneck gives no CDF tables: {e}") from e
    if tables.names(tables.Y)[0] in missing:
        computed |= tables.gaussian()
    return result | {k: computed[k] if k in computed else state[k] for k in needed}


def _check_tables(tensors: Mapping[str, Tensor], net: Network) -> None:
    if net.architecture.prior == "factorized":
        contexts = tensors[f"{tables.Z}._offset"].numel()
        if contexts != net.M:
            raise ValueError(f"there are {contexts} CDFs; {net.M} channels need as many")
        return
    scales = tensors[f"{tables.Y}.scale_table"]
    contexts_of = [tensors[f"{p}._offset"].numel() for p in (tables.Z, tables.Y)]
    if contexts_of != [net.N, scales.numel()]:
        raise ValueError(
            f"there are {contexts_of[0]} and {contexts_of[1]} CDFs for z and y; "
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
