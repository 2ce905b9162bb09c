"""Reads the contents of checkpoint files without running code in them."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.errors import WeightsError
from models.pictures import signatures

_CLASS_IN_FILE = re.compile(r"GLOBAL ([\w.]+)")
"""Part of torch's error about an object that could be restored only by running code."""
_HEAD = 1024
"""Bytes by which a file's format is recognised."""
_LFS = b"version https://git-lfs"


class _Ignored:
    """Takes the place of objects in a checkpoint, such as a script's options: they are not used."""

    def __new__(cls, *_: object) -> "OrderedDict[object, object]":  # type: ignore[misc]
        """Return a mapping: torch lets a file add items and attributes to it."""
        return OrderedDict()


class _IgnoredArray:
    """The same for arrays and numbers of NumPy, such as the best loss."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def load_checkpoint(file: Path) -> object:
    """Return the contents of a safetensors file or a PyTorch checkpoint.

    Objects other than tensors and plain Python values are replaced by empty ones. Raises
    `WeightsError` for other files, `OSError` if the file cannot be opened.
    """
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    try:
        if head[8:9] == b"{" and head[:1] != b"P":
            return load_file(file)
        return _load_torch(file)
    except Exception as e:  # `torch.load` raises many kinds of errors for damaged files
        raise WeightsError(
            "not a safetensors file or a PyTorch checkpoint of tensors only; write one with "
            f"torch.save(model.state_dict(), FILE){_reason(head, e)}"
        ) from e


def _load_torch(file: Path) -> object:
    ignored: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_IgnoredArray if name.startswith("numpy.") else _Ignored, name) for name in _classes(file)
    ]
    with warnings.catch_warnings(), safe_globals(ignored), file.open("rb") as opened:
        warnings.simplefilter("ignore")  # about the file's pickle protocol
        return torch.load(opened, map_location="cpu", weights_only=True)


def _classes(file: Path) -> list[str]:
    """Names of the classes and functions that the file needs, without those that torch allows."""
    try:
        return list(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a file of another format, or a damaged one, which `torch.load` refuses
        return []


def _reason(head: bytes, error: Exception) -> str:
    """Why a file cannot be read, to end an error's text; empty if nothing is known."""
    if match := _CLASS_IN_FILE.search(str(error)):
        return f": the file also needs {match[1]}, but no code in a file is run"
    if head.startswith(_LFS):
        return ": the file is a pointer of Git LFS; run git lfs pull"
    name = signatures.name_of(head)
    if name not in {None, "ZIP"}:
        return f": the file's format is {name}"
    if isinstance(error, RuntimeError | SafetensorError | OSError):
        return f": {(str(error).splitlines() or [''])[0]}"
    return ""
