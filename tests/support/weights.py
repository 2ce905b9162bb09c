"""Shipped weights that are read from disk once for all tests of a process."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import checkpoint, library
from models.codec import zoo
from models.diffusion import decoder

_codec = functools.cache(zoo.load)
_decoders = functools.cache(decoder.load_all)


def load_all() -> None:
    """Load what `library.load` loads, for this process and those that are forked from it."""
    with loaded_once():
        library.load()


@contextlib.contextmanager
def loaded_once() -> Iterator[None]:
    """Let `zoo.load`, `decoder.load` and `decoder.load_all` return the shipped networks that were
    loaded before.

    Other folders are read as ever. Only for tests that do not change the networks.
    """
    load_codec, load_decoders = zoo.load, decoder.load_all

    def codec(quality: int, metric: Any = "mse", folder: Path = checkpoint.WEIGHTS) -> Any:
        load = _codec if folder == checkpoint.WEIGHTS else load_codec
        return load(quality, metric, folder)

    def diffusion(folder: Path = checkpoint.WEIGHTS, device: Any = None) -> Any:
        load = _decoders if folder == checkpoint.WEIGHTS else load_decoders
        return load(folder, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "load", codec)
        patch.setattr(decoder, "load_all", diffusion)
        patch.setattr(decoder, "load", lambda *arguments: diffusion(*arguments)[0])
        yield
