"""Import and export CompressAI's checkpoints. Requests do not use this module."""

import contextlib
import io
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from models.checkpoint import Entry
from models.codec import architectures, catalogue, checkpoint_files, published, state_dicts, zoo
from models.codec.architectures import ARCHITECTURES
from models.codec.bitstream import Metric
from models.errors import ParameterError, WeightsError
from models.files import write_output

SUFFIXES = (".safetensors", ".pth", ".pth.tar")
TIMEOUT_S = 30.0
"""Longest time without data during a download."""

_CONSTANTS = ("_reparam.pedestal", ".bound", ".target", ".scale_bound", "_prediction.mask")
"""Suffixes of buffers that are the same in every checkpoint, and are not imported."""
_WRAPPERS = ("state_dict", "net", "model", "network", "model_state_dict", "net_state_dict")
"""Keys under which training scripts save a state dict, beside the optimiser's and others."""
_NESTING = 3
"""Most wrappers around a state dict."""
_PRIOR = re.compile(r"(.*?)entropy_bottleneck\.")
"""A tensor of the prior, which every model has, behind the prefix of all names of its net: of
`DataParallel`, `torch.compile`, Lightning, or another net."""
_SHOWN = 4
"""Most keys of a mapping that an error names."""
_INNER = re.compile(r"(?<=\.)(?:module|_orig_mod)\.")
"""The same within a name, where only a part of the net was wrapped."""
_OLD_NAME = re.compile(r"^(entropy_bottleneck)\._(matri|bias|factor)(?:x|ces\.|es\.|s\.)?(\d)$")
_NEW_NAME = {"matri": "matrices", "bias": "biases", "factor": "factors"}
"""Parameters of the prior of z: names in older CompressAI versions -> current names."""


def install(
    file: Path,
    quality: int,
    metric: Metric,
    folder: Path,
    source: str | None = None,
    model: str = "",
) -> Entry:
    """Validate a checkpoint, compute the CDF tables that it lacks, and install it in `folder`.

    `source` is recorded in the manifest (default: the file's name). Without a `model`, the tensors
    tell which it is. Raises `WeightsError`, which names the invalid tensor, or `ParameterError` for
    an unknown model or a quality that it does not have.
    """
    try:
        state = read(file)
        model = model or state_dicts.detect(state)
        tensors = zoo.with_tables(validate(state, quality, model))
        codec = zoo.from_tensors(tensors, quality, metric, model)
    except WeightsError as e:
        raise WeightsError(f"{source or file}: {e}") from e
    name = f"{model}_q{quality}_{metric}_{codec.weights_id}"
    row: dict[str, str | int] = {"kind": "codec", "quality": quality, "metric": metric}
    row["source"] = source or file.name
    if model != architectures.DEFAULT:  # older versions of Afterimage know no other
        row["model"] = model
    replaces = ("weights_id", "quality", "metric")
    return catalogue.install(tensors, name, folder, row, replaces=replaces)


def install_from_zoo(
    quality: int, metric: Metric, folder: Path, model: str = architectures.DEFAULT
) -> Entry:
    """Download the checkpoint in CompressAI's zoo for this quality and metric, and install it.

    Raises `WeightsError` if the download fails or as `install` does, `ParameterError` if there is
    no such checkpoint.
    """
    architectures.channels(model, quality)
    if instead := architectures.find(model).published:
        raise ParameterError(
            f"CompressAI publishes no weights of {model}: its programs use those of {instead}, so "
            f"import these with --model {instead}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        file = _download(published.url(model, metric, quality), Path(temporary))
        return install(file, quality, metric, folder, f"zoo: {file.name}", model)


def read(file: Path) -> dict[str, Tensor]:
    """Read the state dict in a checkpoint file, as training scripts write it.

    It may be in wrappers, and its names may have prefixes or be of older CompressAI versions: the
    names returned are today's. Numbers beside the tensors are dropped. No code in the file is run.
    Raises `WeightsError` if the file is not a checkpoint, `OSError` if it cannot be opened.
    """
    state = checkpoint_files.load_checkpoint(file)
    if not isinstance(state, Mapping):
        raise WeightsError(f"the file holds a {type(state).__name__}; a state dict is needed")
    tensors = {}
    for name, value in _find(state).items():
        if isinstance(value, int | float | str | None):
            continue
        if not _is_plain(value):
            raise WeightsError(f"{name!r} is not a plain tensor; a state dict of tensors is needed")
        tensors[name] = value
    return tensors


def _find(state: Mapping[object, object]) -> dict[str, object]:
    """Return the one mapping in `state` that has the names of a model. Raises as `read`."""
    known = {name for model in ARCHITECTURES for name in state_dicts.parameters(model, 2, 2)}

    def score(names: Mapping[str, object]) -> int:
        return len(known & names.keys())

    found = list(_mappings(state, _WRAPPERS))
    best = max(score(names) for _, names in found)
    if not best:
        found = list(_mappings(state))
        best = max(score(names) for _, names in found)
    if not best:
        raise WeightsError(
            "no state dict of a supported model, which has tensors like g_a.0.weight: the file "
            f"holds {_keys(state)}"
        )
    (path, names), *others = [(path, names) for path, names in found if score(names) == best]
    if others:
        raise WeightsError(
            f"more than one state dict of a model: at {path or '/'} and at {others[0][0]}; "
            "save the one that is to be imported"
        )
    return names


def _mappings(
    state: Mapping[object, object],
    wrappers: Sequence[str] = (),
    path: str = "",
    nesting: int = _NESTING,
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield path and contents, with current names, of `state` and each mapping in `wrappers`.

    Without `wrappers`, in all its items.
    """
    yield from _nets(state, path)
    for name, inner in state.items() if nesting else ():
        if isinstance(inner, Mapping) and (not wrappers or name in wrappers):
            yield from _mappings(inner, wrappers, f"{path}/{name!s:.60}", nesting - 1)


def _nets(state: Mapping[object, object], path: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield path and contents, with current names, of each net in a state dict.

    The names of a net may have a prefix, beside names of other modules, such as those of a loss.
    """
    names = [str(name) for name in state]
    prefixes = dict.fromkeys(found[1] for name in names if (found := _PRIOR.match(name)))
    for prefix in prefixes or [""]:
        net = {
            _current_name(name.removeprefix(prefix)): value
            for name, value in zip(names, state.values(), strict=True)
            if name.startswith(prefix)
        }
        yield f"{path}/{prefix}".rstrip("/.") if prefix else path, net


def _keys(state: Mapping[object, object], nesting: int = _NESTING) -> str:
    """Return the first keys of a mapping and of the wrappers in it, for an error's text."""
    names = []
    for key, value in list(state.items())[:_SHOWN]:
        name = f"{str(key)[:60]!r}"
        if nesting and key in _WRAPPERS and isinstance(value, Mapping):
            name += f" (with {_keys(value, nesting - 1)})"
        names.append(name)
    if len(state) > _SHOWN:
        names.append(f"{len(state) - _SHOWN} more")
    return ", ".join(names) or "nothing"


def validate(
    state: Mapping[str, Tensor], quality: int, model: str = architectures.DEFAULT
) -> dict[str, Tensor]:
    """Check that a state dict fits the network of this model and quality.

    Returns its parameters in float32 and its complete CDF tables. Raises `WeightsError`, which
    names the first invalid tensor, or `ParameterError` if the model does not have the quality.
    """
    n, m = architectures.channels(model, quality)
    shapes = state_dicts.parameters(model, n, m)
    tensors = {k: v for k, v in state.items() if not k.endswith(_CONSTANTS)}
    needed = zoo.table_names(shapes)
    other = (
        "" if (actual := state_dicts.detect(state)) == model else f"; it seems to be of {actual}"
    )
    for name in tensors:
        if name not in shapes and name not in needed:
            raise WeightsError(f"{name} is not a tensor of {model}; use a checkpoint of it{other}")
    for name, shape in shapes.items():
        if name not in tensors:
            raise WeightsError(f"{name} is missing; use a complete checkpoint of {model}{other}")
        value = tensors[name]
        if value.shape != shape:
            raise WeightsError(
                f"{name} has the shape {tuple(value.shape)}; quality {quality} "
                f"(N = {n}, M = {m}) has {shape}{other}"
            )
        tensors[name] = _floats(name, value)
    return _check_tables(tensors)


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
    """Check the CDF tables among `tensors`. Incomplete ones are dropped, to be computed anew."""
    others = {k: v for k, v in tensors.items() if k not in zoo.TABLES}
    kept = zoo.complete_tables(tensors)
    tables = {k: (_floats if "scale" in k else _integers)(k, tensors[k]) for k in kept}
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
    """Return CompressAI's current name for a tensor of an older version or a wrapped module."""
    name = _INNER.sub("", name)
    old = _OLD_NAME.match(name)
    name = name.replace(".downsample.", ".skip.")
    return f"{old[1]}.{_NEW_NAME[old[2]]}.{old[3]}" if old else name


def _download(url: str, folder: Path) -> Path:
    from torch.hub import download_url_to_file

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
