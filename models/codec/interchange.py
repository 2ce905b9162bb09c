"""Import and export CompressAI's checkpoints of `mbt2018-mean`. Requests do not use this module."""

import contextlib
import io
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from models.checkpoint import Entry
from models.codec import catalogue, zoo
from models.codec.bitstream import Metric
from models.codec.msh import MeanScaleHyperprior
from models.errors import ParameterError, WeightsError
from models.files import write_output

SUFFIXES = (".safetensors", ".pth", ".pth.tar")
TIMEOUT_S = 30.0
"""Longest time without data during a download."""

_CONSTANTS = ("_reparam.pedestal", ".bound", ".target", ".scale_bound")
"""Suffixes of buffers that are the same in every checkpoint, and are not imported."""
_FILTERS = (1, 3, 3, 3, 3, 1)
"""Layer widths of the factorised prior of z (the network for its cumulative distribution)."""
_OLD_NAME = re.compile(r"^(entropy_bottleneck)\._(matri|bias|factor)(?:x|ces\.|es\.|s\.)?(\d)$")
_NEW_NAME = {"matri": "matrices", "bias": "biases", "factor": "factors"}
"""Parameters of the prior of z: names in older CompressAI versions -> current names."""


def channels(quality: int) -> tuple[int, int]:
    """Return the channels N and M of a quality; they are the same for both metrics."""
    return (128, 192) if quality <= 4 else (192, 320)


def parameters(N: int, M: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all parameters of CompressAI's `MeanScaleHyperprior(N, M)`."""
    with torch.device("meta"):
        transforms = MeanScaleHyperprior(N, M).state_dict()
    shapes = {name: tuple(value.shape) for name, value in transforms.items()}
    prior = "entropy_bottleneck"
    shapes[f"{prior}.quantiles"] = (N, 1, 3)
    for i, (inputs, outputs) in enumerate(pairwise(_FILTERS)):
        shapes[f"{prior}.matrices.{i}"] = (N, outputs, inputs)
        shapes[f"{prior}.biases.{i}"] = (N, outputs, 1)
        if i < len(_FILTERS) - 2:
            shapes[f"{prior}.factors.{i}"] = (N, outputs, 1)
    return shapes


def install(
    file: Path, quality: int, metric: Metric, folder: Path, source: str | None = None
) -> Entry:
    """Validate a checkpoint, compute its CDF tables if it has none, and install it in `folder`.

    `source` is recorded in the manifest (default: the file's name). Raises `WeightsError`, which
    names the invalid tensor.
    """
    try:
        tensors = zoo.with_tables(validate(read(file), quality))
        codec = zoo.from_tensors(tensors, quality, metric)
    except WeightsError as e:
        raise WeightsError(f"{source or file}: {e}") from e
    name = f"mbt2018-mean_q{quality}_{metric}_{codec.weights_id}"
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": metric}
    row["source"] = source or file.name
    replaces = ("weights_id", "quality", "metric")
    return catalogue.install(tensors, name, folder, row, replaces=replaces)


def install_from_zoo(quality: int, metric: Metric, folder: Path) -> Entry:
    """Download the checkpoint in CompressAI's zoo for this quality and metric, and install it.

    Raises `WeightsError` if the download fails or as `install` does.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = _download(quality, metric, Path(temporary))
        return install(file, quality, metric, folder, f"zoo: {file.name}")


def read(file: Path) -> dict[str, Tensor]:
    """Read a state dict, at the top level or under `state_dict`, from a checkpoint file.

    Names of older CompressAI versions become those of today's. No code in the file is run. Raises
    `WeightsError` if the file is not a checkpoint, `OSError` if it cannot be opened.
    """
    state: object
    file.open("rb").close()  # raises an OSError that names the file
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            with warnings.catch_warnings():  # about the file's pickle protocol
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # `torch.load` raises many kinds of errors for damaged files
        reason = f": {_first_line(e)}" if isinstance(e, RuntimeError | SafetensorError) else ""
        raise WeightsError(
            "not a safetensors file or a PyTorch checkpoint of tensors only; write one with "
            f"torch.save(model.state_dict(), FILE){reason}"
        ) from e
    if isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise WeightsError(f"the file holds a {type(state).__name__}; a state dict is needed")
    for name, value in state.items():
        if not _is_plain(value):
            raise WeightsError(f"{name!r} is not a plain tensor; a state dict of tensors is needed")
    return {_current_name(str(name)): value for name, value in state.items()}


def validate(state: Mapping[str, Tensor], quality: int) -> dict[str, Tensor]:
    """Check that a state dict fits the network of this quality.

    Returns its parameters in float32 and its CDF tables. Raises `WeightsError`, which names the
    first invalid tensor.
    """
    n, m = channels(quality)
    shapes = parameters(n, m)
    tensors = {k: v for k, v in state.items() if not k.endswith(_CONSTANTS)}
    for name in tensors:
        if name not in shapes and name not in zoo.TABLES:
            raise WeightsError(f"{name} is not a tensor of mbt2018-mean; use a checkpoint of it")
    for name, shape in shapes.items():
        if name not in tensors:
            raise WeightsError(f"{name} is missing; use a complete checkpoint of mbt2018-mean")
        value = tensors[name]
        if value.shape != shape:
            raise WeightsError(
                f"{name} has the shape {tuple(value.shape)}; quality {quality} "
                f"(N = {n}, M = {m}) has {shape}"
            )
        tensors[name] = _floats(name, value)
    return _check_tables(tensors)


def to_compressai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a codec's tensors to a state dict for CompressAI's `MeanScaleHyperprior`."""
    net = zoo.compressai_model(*tensors["g_a.6.weight"].shape[:2][::-1])
    floats = {k: v if k in zoo.TABLES else v.float() for k, v in tensors.items()}
    net.load_state_dict({**net.state_dict(), **floats})
    return dict(net.state_dict())


def check_suffix(file: Path) -> None:
    """Raise `ParameterError` unless the file's name ends with one of `SUFFIXES`."""
    if not file.name.endswith(SUFFIXES):
        raise ParameterError(f"{file}: the name must end with {', '.join(SUFFIXES)}")


def write(state: dict[str, Tensor], file: Path) -> None:
    """Write a state dict in the format that the file's suffix names.

    Raises `ParameterError` for other suffixes than `SUFFIXES`.
    """
    check_suffix(file)
    if file.suffix == ".safetensors":
        data = save({k: v.contiguous() for k, v in state.items()})
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
    write_output(file, data)


def _check_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check that `tensors` contain all CDF tables or none; drop empty ones."""
    present = [name for name in zoo.TABLES if name in tensors and tensors[name].numel()]
    if present and len(present) < len(zoo.TABLES):
        missing = next(name for name in zoo.TABLES if name not in present)
        raise WeightsError(
            f"{missing} is missing, while {present[0]} is there; save all CDF tables or none"
        )
    others = {k: v for k, v in tensors.items() if k not in zoo.TABLES}
    tables = {k: (_floats if "scale" in k else _integers)(k, tensors[k]) for k in present}
    return others | tables


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Tell whether `value` is a dense tensor whose bytes are all in the file.

    A view with stride 0 is not: a small file can declare one that is larger than memory.
    """
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _floats(name: str, value: Tensor) -> Tensor:
    if value.is_floating_point():
        floats = value.detach().float().contiguous()
        if floats.isfinite().all():
            return floats
    raise WeightsError(f"{name} holds values that are not finite floating-point numbers")


def _integers(name: str, value: Tensor) -> Tensor:
    if value.dtype in {torch.int32, torch.int64}:
        integers = value.int().contiguous()
        if (integers == value).all():
            return integers
    raise WeightsError(f"{name} holds values that are not 32-bit integers")


def _current_name(name: str) -> str:
    """Return CompressAI's current name for a tensor of an older version or of `DataParallel`."""
    name = name.removeprefix("module.")
    old = _OLD_NAME.match(name)
    return f"{old[1]}.{_NEW_NAME[old[2]]}.{old[3]}" if old else name


def _download(quality: int, metric: Metric, folder: Path) -> Path:
    with warnings.catch_warnings():  # DeprecationWarning from its dependencies
        warnings.simplefilter("ignore")
        from compressai.zoo import image as published
    from torch.hub import download_url_to_file

    url: str = published.model_urls["mbt2018-mean"][metric][quality]
    file = folder / url.rpartition("/")[2]
    digest = file.name.partition(".")[0].rpartition("-")[2]
    try:
        with _socket_timeout():
            download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as e:
        why = _first_line(getattr(e, "reason", e))
        raise WeightsError(f"{file.name} cannot be downloaded from CompressAI's zoo: {why}") from e
    return file


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    """Use `TIMEOUT_S` as the default timeout of sockets, because torch's download sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _first_line(e: object) -> str:
    """Return the first sentence of an error's text, or its class name if there is no text."""
    return next(iter(str(e).splitlines()), "").partition(". ")[0] or type(e).__name__
