"""CompressAI's checkpoints of `mbt2018-mean`, in and out; nothing here serves requests."""

import contextlib
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
from models.files import atomic_write

SUFFIXES = (".safetensors", ".pth", ".pth.tar")
TIMEOUT_S = 30.0
"""How long a download may stand still."""

_CONSTANTS = ("_reparam.pedestal", ".bound", ".target", ".scale_bound")
"""Ends of names of buffers that are the same in every checkpoint."""
_FILTERS = (1, 3, 3, 3, 3, 1)
"""Widths of the cumulative's layers in the factorised prior of z."""
_OLD_NAME = re.compile(r"^(entropy_bottleneck)\._(matri|bias|factor)(?:x|ces\.|es\.|s\.)?(\d)$")
_NEW_NAME = {"matri": "matrices", "bias": "biases", "factor": "factors"}


def channels(quality: int) -> tuple[int, int]:
    """N and M of a quality, for either metric."""
    return (128, 192) if quality <= 4 else (192, 320)


def parameters(N: int, M: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that CompressAI's `MeanScaleHyperprior(N, M)` learns."""
    with torch.device("meta"):
        own = MeanScaleHyperprior(N, M).state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
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
    """Check a checkpoint, make its CDF tables where it has none, and put it into the user's folder.

    Raises `WeightsError`, which names the tensor that is wrong.
    """
    try:
        tensors = zoo.with_tables(checked(read(file), quality))
        made = zoo.from_tensors(tensors, quality, metric)
    except WeightsError as e:
        raise WeightsError(f"{source or file}: {e}") from e
    name = f"mbt2018-mean_q{quality}_{metric}_{made.weights_id}"
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": metric}
    row["source"] = source or file.name
    same = ("weights_id", "quality", "metric")
    return catalogue.install(tensors, name, folder, row, replaces=same)


def install_from_zoo(quality: int, metric: Metric, folder: Path) -> Entry:
    """`install` for the checkpoint that CompressAI's zoo names, downloaded.

    Raises `WeightsError`, also where the download fails.
    """
    with tempfile.TemporaryDirectory() as private:
        file = _download(quality, metric, Path(private))
        return install(file, quality, metric, folder, f"zoo: {file.name}")


def read(file: Path) -> dict[str, Tensor]:
    """A state dict, or one under `state_dict`, by the names that CompressAI uses today.

    No code in the file is run. Raises `WeightsError`, `OSError` where it cannot be opened.
    """
    found: object
    file.open("rb").close()  # its errors name the file
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            with warnings.catch_warnings():  # about the file's pickle protocol
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch's reader raises almost anything at damaged files
        told = isinstance(e, (RuntimeError, SafetensorError)) and _line(e)  # others tell nothing
        raise WeightsError(
            "no checkpoint of tensors alone, as torch.save(model.state_dict(), FILE) writes it"
            + (f": {told}" if told else "")
        ) from e
    if isinstance(found, Mapping) and "state_dict" in found:
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise WeightsError(f"no state dict, but a {type(found).__name__}")
    for name, value in found.items():
        if not _is_plain(value):
            raise WeightsError(f"{name!r} is no plain tensor: the file holds no state dict")
    return {_renamed(str(name)): value for name, value in found.items()}


def checked(state: Mapping[str, Tensor], quality: int) -> dict[str, Tensor]:
    """The parameters, in float32, and tables of a state dict that fits the quality's network.

    Raises `WeightsError`, which names the first tensor that is wrong.
    """
    n, m = channels(quality)
    shapes = parameters(n, m)
    kept = {k: v for k, v in state.items() if not k.endswith(_CONSTANTS)}
    for name in kept:
        if name not in shapes and name not in zoo.TABLES:
            raise WeightsError(f"{name} is no tensor of mbt2018-mean: another model's checkpoint")
    for name, shape in shapes.items():
        if name not in kept:
            raise WeightsError(f"{name} is missing")
        value = kept[name]
        if value.shape != shape:
            raise WeightsError(
                f"{name} has the shape {tuple(value.shape)}; quality {quality} "
                f"(N = {n}, M = {m}) has {shape}"
            )
        kept[name] = _floats(name, value)
    return _check_tables(kept)


def to_compressai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A codec's tensors -> the state dict that CompressAI's `MeanScaleHyperprior` loads."""
    net = zoo.reference(*tensors["g_a.6.weight"].shape[:2][::-1])
    floats = {k: v if k in zoo.TABLES else v.float() for k, v in tensors.items()}
    net.load_state_dict({**net.state_dict(), **floats})
    return dict(net.state_dict())


def check_suffix(file: Path) -> None:
    """`ParameterError` for a name that ends with none of `SUFFIXES`."""
    if not file.name.endswith(SUFFIXES):
        raise ParameterError(f"{file}: write {', '.join(SUFFIXES)}")


def write(state: dict[str, Tensor], file: Path) -> None:
    """A state dict to a file of one of `SUFFIXES`; `ParameterError` for other names."""
    check_suffix(file)
    with atomic_write(file) as part, part.open("wb") as out:
        if file.suffix == ".safetensors":
            out.write(save({k: v.contiguous() for k, v in state.items()}))
        else:
            torch.save(state, out)


def _check_tables(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tables or none: `kept` with those that are there, without empty ones."""
    present = [name for name in zoo.TABLES if name in kept and kept[name].numel()]
    if present and len(present) < len(zoo.TABLES):
        missing = next(name for name in zoo.TABLES if name not in present)
        raise WeightsError(f"{missing} is missing, while {present[0]} is there")
    others = {k: v for k, v in kept.items() if k not in zoo.TABLES}
    tables = {k: (_floats if "scale" in k else _integers)(k, kept[k]) for k in present}
    return others | tables


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Dense, and no larger than what the file holds of it (a view may repeat a number)."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _floats(name: str, value: Tensor) -> Tensor:
    if value.is_floating_point():
        found = value.detach().float().contiguous()
        if found.isfinite().all():
            return found
    raise WeightsError(f"{name} holds values that are no finite floating-point numbers")


def _integers(name: str, value: Tensor) -> Tensor:
    if value.dtype in {torch.int32, torch.int64}:
        found = value.int().contiguous()
        if (found == value).all():
            return found
    raise WeightsError(f"{name} holds values that are no 32-bit integers")


def _renamed(name: str) -> str:
    """Today's name: older versions and `DataParallel` used others."""
    name = name.removeprefix("module.")
    old = _OLD_NAME.match(name)
    return f"{old[1]}.{_NEW_NAME[old[2]]}.{old[3]}" if old else name


def _download(quality: int, metric: Metric, folder: Path) -> Path:
    with warnings.catch_warnings():  # of what compressai imports
        warnings.simplefilter("ignore")
        from compressai.zoo import image as theirs  # type: ignore[import-untyped]
    from torch.hub import download_url_to_file

    url: str = theirs.model_urls["mbt2018-mean"][metric][quality]
    file = folder / url.rpartition("/")[2]
    digest = file.name.partition(".")[0].rpartition("-")[2]
    try:
        with _no_standstill():
            download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as e:
        why = _line(getattr(e, "reason", e))
        raise WeightsError(f"{file.name} cannot be downloaded from CompressAI's zoo: {why}") from e
    return file


@contextlib.contextmanager
def _no_standstill() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _line(e: object) -> str:
    """The first sentence of an error's text, or its kind."""
    return next(iter(str(e).splitlines()), "").partition(". ")[0] or type(e).__name__
