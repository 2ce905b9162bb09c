"""Authentication by API key, signed link or, on a service without keys, by client address."""

import hmac
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from service import addresses, keys, parameters, prefix, signed_urls
from service.keys import SCOPES, Key, KeysError, Scope
from service.problems import Forbidden, Unauthorized
from worker.queue.records import Priority

CHECK_S = 1.0
"""Seconds between two checks of the key file; a removed key works until the next check."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client: its name, its scopes, and the limits and shares set by its key.

    With a signed link (`has_link`) it may see that link's picture, even in a private service.
    """

    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    jobs_at_once: int | None = None
    priority: Priority = "interactive"
    weight: float = 1.0
    has_link: bool = False


class Keys:
    """The API keys of a TOML file, reloaded when the file changes."""

    def __init__(self, path: Path, loaded: list[Key], version: tuple[int, ...] | None) -> None:
        self._path, self._keys, self._version = path, loaded, version
        self._checked_at = time.monotonic()

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Load the keys from `path`. Raises `KeysError` if the file is missing or invalid."""
        version = _file_version(path)  # taken before reading, so that no change is missed
        return cls(path, keys.read(path), version)

    @property
    def names(self) -> set[str]:
        """The names of all keys."""
        return {key.name for key in self._keys}

    def find(self, token: str) -> Caller | None:
        """Return the caller that owns `token`, or None if the key is unknown or has expired.

        Compares `token` with every key, each in constant time.
        """
        self._reload_if_changed()
        digest, match = keys.digest(token), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                match = key
        if match is None or match.expired:
            return None
        return _caller(match)

    def named(self, name: str, scope: Scope) -> Caller:
        """Return the caller of this name, for work that goes on after its request.

        Raises `Unauthorized` unless it has a key with this scope that has not expired.
        """
        self._reload_if_changed()
        for key in self._keys:
            if key.name == name and not key.expired and scope in key.scopes:
                return _caller(key)
        raise Unauthorized(f"{name} has no valid API key with the scope {scope} any more")

    def _reload_if_changed(self) -> None:
        """Reload a changed file; if it has become invalid, log that once and keep the old keys."""
        now = time.monotonic()
        if now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        version = _file_version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = keys.read(self._path)
        except KeysError as e:
            log.error("the file of API keys is invalid, so the previous keys stay in use: %s", e)


def _caller(key: Key) -> Caller:
    return Caller(
        key.name, frozenset(key.scopes), key.requests_per_minute, key.jobs_at_once, key.priority,
        key.weight,
    )  # fmt: skip


def _file_version(path: Path) -> tuple[int, ...] | None:
    """Modification time, size and inode of a file; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def anonymous(request: Request, scope: Scope) -> Caller:
    """The caller on a service without API keys, whose address is its name.

    It has all scopes; only on this machine it has `operate`. Raises `Forbidden` without `scope`.
    """
    local = request.client is not None and addresses.is_loopback(request.client.host)
    scopes = frozenset(SCOPES) if local else frozenset(SCOPES) - {"operate"}
    if scope not in scopes:
        message = (
            "without API keys, only clients on the service's own machine may operate the queue; "
            "set AFTERIMAGE_API_KEYS, and use a key with the scope operate"
        )
        raise Forbidden(message)
    return Caller(client_address(request), scopes)


def link_holder(request: Request, secret: bytes | None) -> Caller | None:
    """The caller of a GET or HEAD request with a signed link; None for requests without one.

    The caller's name contains a colon, which names of keys cannot contain. Without `secret`, links
    are disabled. Raises `Unauthorized` if the link was altered or has expired.
    """
    if secret is None or request.method not in {"GET", "HEAD"}:
        return None
    if signed_urls.SIGNATURE_PARAMETERS.isdisjoint(request.query_params):
        return None
    query = parameters.link_query(request)
    if not signed_urls.valid(secret, prefix.routed(request.scope["path"]), query, time.time()):
        message = "the link was altered or has expired; ask for a new link"
        raise Unauthorized(message, {"WWW-Authenticate": "Bearer"})
    return Caller(f"link:{client_address(request)}", frozenset(), has_link=True)


def authenticate(keys: Keys, token: str | None, scope: Scope) -> Caller:
    """Return the caller that owns the API key `token`.

    Raises `Unauthorized` without a valid key, `Forbidden` if the key lacks `scope`.
    """
    if not token:
        message = "no API key and no valid signed link; send the header Authorization: Bearer KEY"
        raise Unauthorized(message, {"WWW-Authenticate": "Bearer"})
    caller = keys.find(token)
    if caller is None:
        challenge = 'Bearer error="invalid_token"'
        message = "the API key is not valid: it is unknown or has expired; use another key"
        raise Unauthorized(message, {"WWW-Authenticate": challenge})
    if scope not in caller.scopes:
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        message = f"the API key lacks the scope {scope}; use a key that has it"
        raise Forbidden(message, {"WWW-Authenticate": challenge})
    return caller


def client_address(request: Request) -> str:
    """The client's IPv4 address or the /64 of its IPv6 address; empty if it is not known."""
    return addresses.network(request.client.host) if request.client else ""
