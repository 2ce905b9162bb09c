"""Who asks: by API key, by signed link, or by address where the service has no keys."""

import functools
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service import keys, signed_urls
from service.keys import SCOPES, Key, KeysError, Scope
from service.problems import Forbidden, Unauthorized

CHECK_S = 1.0
"""How long keys that were withdrawn from the file hold, at most."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, what it may ask for, and how much where its key says so."""

    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    jobs_at_once: int | None = None


class Keys:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path, found: list[Key], version: tuple[int, ...] | None) -> None:
        self._path, self._keys, self._version = path, found, version
        self._checked = time.monotonic()

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Raises `KeysError` for a file that is missing or wrong."""
        version = _version(path)  # before it is read, so that no change is missed
        return cls(path, keys.read(path), version)

    def find(self, token: str) -> Caller | None:
        """Whose key it is; None where it is unknown or expired. All are compared, in equal time."""
        self._renew()
        given, found = keys.digest(token), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None or found.expired:
            return None
        limits = (found.requests_per_minute, found.jobs_at_once)
        return Caller(found.name, frozenset(found.scopes), *limits)

    def _renew(self) -> None:
        """A file that has become wrong changes nothing, and is told once."""
        now = time.monotonic()
        if now - self._checked < CHECK_S:
            return
        self._checked = now
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = keys.read(self._path)
        except KeysError as e:
            log.error("the API keys stay as they were: %s", e)


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_BEARER = HTTPBearer(
    auto_error=False, description="An API key; needed only where the service is given keys."
)
_HEADER = APIKeyHeader(
    name="X-API-Key", auto_error=False, description="The same, instead of `Authorization`."
)


@functools.cache
def require(scope: Scope, or_link: bool = False) -> Callable[..., Awaitable[Caller]]:
    """A dependency: who asks, if it may ask for that; `or_link`: a signed link will do for GET.

    It reads `app.state.keys`, which are `Keys`, or None: then everybody may do everything; and
    `app.state.link_secret`, bytes, or None: then there are no links. Raises `Unauthorized`,
    `Forbidden`.
    """

    async def caller(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_HEADER)],
    ) -> Caller:
        known: Keys | None = request.app.state.keys
        if known is None:
            return Caller(address(request), frozenset(SCOPES))
        token = bearer.credentials if bearer else header
        if or_link and not token and _linked(request):
            return Caller(f"link:{address(request)}", frozenset())  # no key has such a name
        found = _identified(known, token)
        if scope not in found.scopes:
            challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
            raise Forbidden(f"the API key lacks the scope {scope}", {"WWW-Authenticate": challenge})
        return found

    return caller


def _linked(request: Request) -> bool:
    """Whether the request is one that a link grants."""
    secret: bytes | None = request.app.state.link_secret
    query = request.scope["query_string"].decode("latin-1")
    if secret is None or request.method not in {"GET", "HEAD"}:
        return False
    return signed_urls.valid(secret, request.scope["path"], query, time.time())


def _identified(known: Keys, token: str | None) -> Caller:
    if not token:
        said = "neither an API key nor a link that is valid still"
        raise Unauthorized(said, {"WWW-Authenticate": "Bearer"})
    found = known.find(token)
    if found is None:
        challenge = 'Bearer error="invalid_token"'
        raise Unauthorized("the API key is not valid", {"WWW-Authenticate": challenge})
    return found


def address(request: Request) -> str:
    """The client's address."""
    return request.client.host if request.client else ""
