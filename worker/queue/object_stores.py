"""The configured object stores: reads and writes objects, and turns obstore's errors into ours."""

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from models.errors import AfterimageError, ParameterError
from worker.queue import object_config
from worker.queue.object_config import StoreConfig, StoresError
from worker.queue.references import (
    ObjectNotFound,
    Reference,
    StoreAway,
    StoreForbidden,
    StoreNotFound,
    StoreRefused,
)
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

REQUEST_S = 30
"""How long one request to a store may take."""
RETRY_S, RETRIES = 10, 3
"""How long, and how often, a request is repeated after a connection error or a 5xx."""
MAX_SECONDS = REQUEST_S + RETRY_S
"""Longest time of one operation: no repetition begins after `RETRY_S`."""
CHUNK = 2**16
"""Smallest part in which an object is read, in bytes."""

_STATUS = re.compile(r"status code: (\d{3})")
_CLIENT_OPTIONS = frozenset({
    "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only",
    "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes",
    "proxy_url", "randomize_addresses", "read_timeout", "root_certificate", "user_agent",
})  # fmt: skip
"""Options of the HTTP client; obstore takes them apart from those of the store."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a store says about an object. Local folders keep no `attributes`."""

    etag: str
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ObjectStores:
    """The configured stores; none without a file of stores."""

    configs: Mapping[str, StoreConfig] = field(default_factory=dict)
    _opened: Mapping[str, Any] = field(default_factory=dict)

    def check(self, ref: Reference, caller: str, access: Literal["read", "write"]) -> None:
        """Raise `StoreNotFound` or `StoreForbidden` unless the caller has this access.

        A store of other callers looks like one that does not exist.
        """
        config = self.configs.get(ref.store)
        if config is None or not config.allows(caller):
            raise StoreNotFound(f"there is no object store {ref.store!r} that you may use")
        if not getattr(config, access):
            raise StoreForbidden(f"the object store {ref.store!r} may not be {_DONE[access]}")

    def head(self, ref: Reference) -> Head | None:
        """What the store says about an object; None if there is none. Raises `StoreError`."""
        import obstore

        try:
            with _translated(ref):
                found = obstore.get(self._opened[ref.store], ref.key, options={"head": True})
                return Head(found.meta["e_tag"] or "", dict(found.attributes))
        except ObjectNotFound:
            return None

    def read(self, ref: Reference, limit: int) -> bytes:
        """Read an object. Raises `StoreError`; `StoreRefused` for more than `limit` bytes."""
        import obstore

        with _translated(ref):
            found = obstore.get(self._opened[ref.store], ref.key)
            if found.meta["size"] > limit:
                raise StoreRefused(f"{ref} has {found.meta['size']} bytes; the limit is {limit}")
            return bytes(found.bytes())

    async def open(self, ref: Reference) -> tuple[int, AsyncIterator[bytes]]:
        """The size of an object, and its parts, which are read as they are asked for.

        Both raise `StoreError`.
        """
        import obstore

        with _translated(ref):
            found = await obstore.get_async(self._opened[ref.store], ref.key)

        async def parts() -> AsyncIterator[bytes]:
            with _translated(ref):
                async for part in found.stream(min_chunk_size=CHUNK):
                    yield bytes(part)

        return found.meta["size"], parts()

    def list(self, prefix: Reference, after: str) -> Iterator[str]:
        """The keys below a prefix that follow `after`, as they are read from the store.

        They are in ascending order, except those of folders. Raises `StoreError`.
        """
        import obstore

        with _translated(prefix):
            pages = obstore.list(
                self._opened[prefix.store],
                prefix.key or None,
                offset=after or None,
                chunk_size=1000,
            )
            for page in pages:
                yield from (found["path"] for found in page)

    def write(self, ref: Reference, data: bytes, media_type: str, about: Mapping[str, str]) -> str:
        """Write an object in one request, and return its ETag. Raises `StoreError`.

        `about` is the object's metadata: names of letters only, as Azure wants them.
        """
        import obstore

        config, options = self.configs[ref.store], {}
        if not config.is_local:
            options = {"attributes": {"Content-Type": media_type, **about}}
        with _translated(ref):
            put: Any = obstore.put
            result = put(self._opened[ref.store], ref.key, data, use_multipart=False, **options)
            return str(result["e_tag"] or "")


_DONE = {"read": "read", "write": "written"}


def connect(settings: WorkerSettings) -> ObjectStores:
    """The stores of the settings, none without a file; nothing is sent to them yet.

    Raises `StoresError` for an invalid file, or if the package obstore is missing.
    """
    if settings.stores is None:
        return ObjectStores()
    configs = object_config.read(settings.stores)
    try:
        from obstore.store import from_url
    except ImportError as e:
        raise StoresError(
            "AFTERIMAGE_STORES is set, but the package obstore is not installed; run "
            "pip install 'afterimage[stores]'"
        ) from e
    opened = {}
    for name, config in configs.items():
        try:
            opened[name] = from_url(config.url, **_options(config, REQUEST_S, RETRIES))
        except Exception as e:
            reason = str(e).partition("\n\nDebug source")[0].strip()
            raise StoresError(f"{settings.stores}: stores.{name}: {reason}") from None
    return ObjectStores(configs, opened)


def impatient(objects: ObjectStores, name: str, request_s: int) -> ObjectStores:
    """One of the stores, whose requests may take `request_s` and are not repeated."""
    from obstore.store import from_url

    config = objects.configs[name]
    return ObjectStores(
        {name: config}, {name: from_url(config.url, **_options(config, request_s, 0))}
    )


def _options(config: StoreConfig, request_s: int, retries: int) -> dict[str, Any]:
    """The arguments of `obstore.store.from_url` besides the URL."""
    if config.is_local:
        return {}
    texts = {
        k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in config.options.items()
    }
    client = {k: v for k, v in texts.items() if k in _CLIENT_OPTIONS}
    return {
        "config": {k: v for k, v in texts.items() if k not in _CLIENT_OPTIONS},
        "client_options": {"connect_timeout": "5s", **client, "timeout": f"{request_s}s"},
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=RETRY_S)},
    }


@contextlib.contextmanager
def _translated(ref: Reference) -> Iterator[None]:
    """Turn obstore's errors into ours, whose messages hold no addresses and no secrets."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as e:
        raise ObjectNotFound(f"there is no object {ref}") from e
    except (BaseError, OSError, ValueError, NotImplementedError) as e:
        raise _error(ref, e) from None


def _error(ref: Reference, e: Exception) -> AfterimageError:
    """The error for clients; the log has the store's own words, without queries and bodies."""
    text = str(e)
    status = _STATUS.search(text)
    first = re.sub(r"\?\S*", "?…", text.partition("\n")[0])
    log.warning("object store %s: %s", ref.store, first)
    if isinstance(e, ValueError):
        return ParameterError(f"{ref}: the store does not accept this key")
    if status and status[1].startswith("4") and status[1] not in {"408", "429"}:
        return StoreRefused(f"the object store {ref.store!r} refused {ref} ({status[1]})")
    if status:
        return StoreAway(f"the object store {ref.store!r} answered {status[1]}; try again later")
    late = re.search("timed ?out", text, re.IGNORECASE)
    reason = "did not answer in time" if late else "cannot be reached"
    return StoreAway(f"the object store {ref.store!r} {reason}; try again later")
