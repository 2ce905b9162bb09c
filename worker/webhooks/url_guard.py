"""Guard against server-side request forgery: webhooks go to public hosts over https only.

A URL is parsed once per attempt and its host resolved once. All addresses must be public, and
`worker.webhooks.pinned_http` connects to these addresses without resolving the host again, so that
a DNS record that changes in between (DNS rebinding) has no effect.
"""

import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Callable, Set
from dataclasses import dataclass

import httpx

from models.errors import ParameterError

MAX_URL = 2048
"""Longest URL, in characters."""
RESOLVE_TIMEOUT_S = 4.0
"""Timeout of resolving a host."""
MAX_ADDRESSES = 8
"""Largest number of a host's addresses that are tried."""

Resolver = Callable[[str], list[str]]
"""Host -> addresses. Raises `OSError` or `UnicodeError` if there are none."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?!.*\.\.)[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")  # inet_aton parses these as addresses
_SPECIAL_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        # IANA special-purpose registries; `is_global` covers them only in part in older Pythons
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        "168.63.129.16/32",  # Azure's internal host
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Teredo, 6to4, documentation
    )
)  # fmt: skip
_GLOBAL_UNICAST_6 = ipaddress.ip_network("2000::/3")  # not mapped, NAT64, site-local, multicast


@dataclass(frozen=True, slots=True)
class Target:
    """A checked URL, parsed, with the addresses to connect to."""

    scheme: str
    host: str  # ASCII; an IPv6 address without brackets
    port: int
    path: bytes  # with the query
    addresses: tuple[str, ...]

    @property
    def authority(self) -> str:
        """The Host header: host, and port unless it is the scheme's default."""
        if self.port == _DEFAULT_PORTS[self.scheme]:
            return _bracketed(self.host)
        return f"{_bracketed(self.host)}:{self.port}"


def is_public(address: str) -> bool:
    """True for a global unicast address that does not embed an IPv4 address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if "%" in address or not ip.is_global:
        return False
    return (ip.version == 4 or ip in _GLOBAL_UNICAST_6) and not any(
        ip in network for network in _SPECIAL_NETWORKS
    )


def resolve(host: str) -> list[str]:
    """Resolve a host with the system's resolver.

    Raises `OSError` or `UnicodeError` without a result, and after `RESOLVE_TIMEOUT_S`.
    """
    results: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def get_addresses() -> None:
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            results.put([str(info[4][0]) for info in infos])
        except (OSError, UnicodeError) as e:
            results.put(e)

    threading.Thread(target=get_addresses, daemon=True, name="resolver").start()
    try:
        result = results.get(timeout=RESOLVE_TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"{host} was not resolved within {RESOLVE_TIMEOUT_S:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def check(url: str, allow: Set[str] = frozenset(), resolver: Resolver = resolve) -> Target:
    """Parse a webhook's URL, resolve its host and check the addresses.

    `allow` holds hosts, or host:port, that may be private, use http and any port. Raises
    `ParameterError`, whose text does not reveal the addresses of internal names.
    """
    scheme, host, port, path = _parts(url)
    allowed = bool({_bracketed(host), f"{_bracketed(host)}:{port}"} & allow)
    if scheme != "https" and not (scheme == "http" and allowed):
        raise ParameterError("webhook: the URL must begin with https://")
    if not allowed and port != 443 and port <= 1023:
        raise ParameterError(f"webhook: port {port} is not allowed; use 443 or a port above 1023")
    try:
        addresses = tuple(dict.fromkeys(resolver(host)))
    except (OSError, UnicodeError):
        addresses = ()
    if not addresses or not (allowed or all(is_public(a) for a in addresses)):
        raise ParameterError(f"webhook: {host} does not resolve, or not to public addresses only")
    return Target(scheme, host, port, path, addresses[:MAX_ADDRESSES])


def _parts(url: str) -> tuple[str, str, int, bytes]:
    """Scheme, host, port, and path with query. Raises `ParameterError`."""
    if len(url) > MAX_URL:
        raise ParameterError(f"webhook: the URL has {len(url)} characters; the limit is {MAX_URL}")
    try:
        parsed = httpx.URL(url)
        host, port = parsed.raw_host.decode("ascii"), parsed.port
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise ParameterError("webhook: the URL is invalid; write https://host/path") from None
    if parsed.userinfo:
        raise ParameterError("webhook: the URL must not contain a user or password")
    if not _is_host(host):
        raise ParameterError("webhook: the URL's host is neither a name nor an IP address")
    port = _DEFAULT_PORTS.get(parsed.scheme, 443) if port is None else port
    if not 0 < port < 65536:
        raise ParameterError(f"webhook: port {port} is not between 1 and 65535")
    return parsed.scheme, host, port, parsed.raw_path


def _is_host(host: str) -> bool:
    """True for an IP address, or for a name that no resolver would parse as an IP address."""
    try:
        ipaddress.ip_address(host)
        return "%" not in host
    except ValueError:
        return bool(_NAME.fullmatch(host)) and not _NUMBER.fullmatch(host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
