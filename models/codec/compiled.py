"""Functions that numba compiles once, and caches in files with a digest.

numba's own cache runs whatever its files contain: one with a wrong byte raises any error, or
crashes the process. Here each compiled function has a file of its own, which is checked first.
"""

import contextlib
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from models import checked_files


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: numba compiles the function without Python objects and the interpreter's
    lock. `options` are further ones of `numba.njit`."""

    def decorate(function: Callable[..., Any]) -> Any:
        found = numba.njit(nogil=True, **options)(function)
        if isinstance(found, Dispatcher):  # else compiling is disabled
            # as `Dispatcher.enable_caching` does
            found._cache = _Cache(function)  # type: ignore[attr-defined]
        return found

    return decorate


class _Cache(FunctionCache):
    """numba's cache of a function, with other files."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        stamp = numba.__version__, self._impl.locator.get_source_stamp()
        self._cache_file = _Files(Path(self.cache_path), self._impl.filename_base, stamp)


class _Files(IndexDataCacheFile):
    """One file for each signature and processor; `stamp` is the version of numba and the source."""

    def __init__(self, folder: Path, name: str, stamp: tuple[Any, ...]) -> None:
        self._folder, self._name = folder, name
        self._stamp = _digest(stamp)

    def load(self, key: tuple[Any, ...]) -> Any:
        """Return what was saved; None if there is nothing, or not of this source."""
        content = checked_files.read(self._file(key))
        if content is None or not content.startswith(self._stamp):
            return None
        return pickle.loads(content[len(self._stamp) :])

    def save(self, key: tuple[Any, ...], data: Any) -> None:
        """Save compiled code, in place of that of another source."""
        content: bytes = dumps(data)  # type: ignore[no-untyped-call]
        with contextlib.suppress(OSError):
            checked_files.write(self._file(key), self._stamp + content)

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self._folder / f"{self._name}.{_digest(key).hex()[:16]}.nbc"


def _digest(value: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()
