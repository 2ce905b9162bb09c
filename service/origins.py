"""Refuses what other websites make a browser send: wrong `Host` names and cross-site requests.

A page of another site can send requests to a service on the same machine or network. It cannot
read the responses, unless a name of its own domain leads to the service's address (DNS rebinding).
"""

import ipaddress
import socket
from collections.abc import Collection
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
"""Paths that answer under any name: probes and scrapers choose their own."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
_OWN = frozenset({b"same-origin", b"none"})
"""`Sec-Fetch-Site` of requests by the service's own page, or by the user."""


class OriginMiddleware:
    """ASGI middleware that checks `Host` and, on a service without API keys, the origin.

    `hosts` are names, `*.` and a domain, or `*` for any. IP addresses, `localhost` and names below
    it are always allowed: no other site has them. `origins` are those that CORS allows; None: all
    requests need a key, which browsers do not add by themselves.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], origins: Collection[str] | None
    ) -> None:
        self.app = app
        self._any_host = "*" in hosts
        self._names = {name.lower() for name in (*hosts, "localhost", "*.localhost")}
        self._origins = origins
        self._allowed = lru_cache(1024)(self._is_allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._check(scope)
            if problem is not None:
                await problem(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> ASGIApp | None:
        """The response to a request that is refused, else None."""
        host = origin = site = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        if not self._any_host and not self._allowed(host):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            return None if path in PROBES else _misdirected(host)
        if self._origins is None or scope["method"] in SAFE:
            return None
        if not _is_foreign(site, origin, host) or self._permits(origin):
            return None
        return _cross_site(origin)

    def _is_allowed(self, host: bytes) -> bool:
        """Whether the service may be reached as `host`, which may have a port."""
        name = _without_port(host.decode("latin-1")).lower().removesuffix(".")
        if not name or name in self._names:
            return True  # HTTP/1.0 needs no Host, browsers send one
        parents = name.split(".")[1:]
        if any(f"*.{'.'.join(parents[n:])}" in self._names for n in range(len(parents))):
            return True
        try:
            ipaddress.ip_address(name.strip("[]").partition("%")[0])
        except ValueError:
            return False
        return True

    def _permits(self, origin: bytes) -> bool:
        """Whether CORS allows the origin."""
        return bool(self._origins) and not {"*", origin.decode("latin-1")}.isdisjoint(
            self._origins or ()
        )


def names(hosts: Collection[str], keyed: bool) -> Collection[str]:
    """Return the allowed names: `hosts`; if there are none, any with keys, else this machine's."""
    return hosts or (("*",) if keyed else (socket.gethostname(),))


def _is_foreign(site: bytes, origin: bytes, host: bytes) -> bool:
    """Whether a page of another origin has sent the request.

    Browsers send `Sec-Fetch-Site` to secure addresses only, `Origin` to all. Other clients send
    neither.
    """
    if site:
        return site not in _OWN
    return bool(origin) and origin.partition(b"://")[2].lower() != host.lower()


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdecimal() and (":" not in name or name.endswith("]")) else host


def _misdirected(host: bytes) -> ASGIApp:
    name = _without_port(host[:255].decode("latin-1"))
    return problems.problem(
        421,
        "misdirected-request",
        f"the service does not answer under the name {name!r}; use its IP address or localhost, or "
        f"let its operator add the name to AFTERIMAGE_HOSTS",
    )


def _cross_site(origin: bytes) -> ASGIApp:
    sender = f"the page at {origin[:255].decode('latin-1')}" if origin else "a page of another site"
    return problems.problem(
        403,
        "cross-site-request",
        f"{sender} may not send this request; the operator can add its origin to "
        "AFTERIMAGE_CORS_ORIGINS",
    )
