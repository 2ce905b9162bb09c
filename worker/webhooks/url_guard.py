"""Where webhooks may go: public hosts over https, at exactly the addresses that were checked.

A URL is taken apart once. Its host is resolved once per delivery, every address is checked, and
`worker.webhooks.pinned_http` connects to those and to nothing else: a name that is given another address in
between gains nothing.
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
"""Characters of a URL."""
RESOLVE_S = 4.0
"""How long the system's resolver may take."""
MAX_ADDRESSES = 8
"""Of a host that are tried."""

Resolver = Callable[[str], list[str]]
"""A host's addresses. Raises `OSError` or `UnicodeError` where there are none."""

_DEFAULT = {"http": 80, "https": 443}
_NAME = re.compile(r"(?!.*\.\.)[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")  # what inet_aton would take for an address
_SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in (
        # the IANA special-purpose registries: which of them `is_global` knows depends on Python
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        "168.63.129.16/32",  # Azure's host, from inside
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Teredo, 6to4 and examples
    )
)  # fmt: skip
_UNICAST = ipaddress.ip_network("2000::/3")  # no mapped, NAT64, site-local or multicast address


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was checked, in parts, with the addresses that it may be sent to."""

    scheme: str
    host: str  # ASCII; an IPv6 address without brackets
    port: int
    path: bytes  # with the query
    addresses: tuple[str, ...]

    @property
    def authority(self) -> str:
        """Of the Host header: the port where it is not the scheme's own."""
        own = self.port == _DEFAULT[self.scheme]
        return _bracketed(self.host) if own else f"{_bracketed(self.host)}:{self.port}"


def public(address: str) -> bool:
    """Whether an address is global unicast, and embeds no other address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if "%" in address or not ip.is_global:
        return False
    return (ip.version == 4 or ip in _UNICAST) and not any(ip in net for net in _SPECIAL)


def resolve(host: str) -> list[str]:
    """The system's answer, within `RESOLVE_S`; `OSError` or `UnicodeError` where there is none."""
    answer: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer.put([str(info[4][0]) for info in found])
        except (OSError, UnicodeError) as e:
            answer.put(e)

    threading.Thread(target=ask, daemon=True, name="resolver").start()
    try:
        found = answer.get(timeout=RESOLVE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {RESOLVE_S:g} s") from None
    if isinstance(found, Exception):
        raise found
    return found


def check(url: str, allow: Set[str] = frozenset(), resolver: Resolver = resolve) -> Target:
    """Take a webhook's URL apart and resolve its host.

    `allow` holds hosts, or host:port, that may be private, plain http and on any port. Raises
    `ParameterError`; its text says nothing about what a name inside our network resolves to.
    """
    scheme, host, port, path = _parts(url)
    allowed = bool({_bracketed(host), f"{_bracketed(host)}:{port}"} & allow)
    if scheme != "https" and not (scheme == "http" and allowed):
        raise ParameterError("webhook: the URL must begin with https://")
    if not allowed and port != 443 and port <= 1023:
        raise ParameterError(f"webhook: port {port} is not 443 and not above 1023")
    try:
        addresses = tuple(dict.fromkeys(resolver(host)))
    except (OSError, UnicodeError):
        addresses = ()
    if not addresses or not (allowed or all(public(a) for a in addresses)):
        raise ParameterError(f"webhook: {host} does not resolve to public addresses only")
    return Target(scheme, host, port, path, addresses[:MAX_ADDRESSES])


def _parts(url: str) -> tuple[str, str, int, bytes]:
    """Scheme, host, port and path of a URL without userinfo; else `ParameterError`."""
    if len(url) > MAX_URL:
        raise ParameterError(f"webhook: {len(url)} characters; at most {MAX_URL} are taken")
    try:
        parsed = httpx.URL(url)
        host, port = parsed.raw_host.decode("ascii"), parsed.port
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise ParameterError("webhook: not a URL") from None
    if parsed.userinfo:
        raise ParameterError("webhook: the URL must not hold a user or password")
    if not _is_host(host):
        raise ParameterError("webhook: the URL's host is neither a name nor an address")
    port = _DEFAULT.get(parsed.scheme, 443) if port is None else port
    if not 0 < port < 65536:
        raise ParameterError(f"webhook: there is no port {port}")
    return parsed.scheme, host, port, parsed.raw_path


def _is_host(host: str) -> bool:
    """A dotted quad, an IPv6 address, or a name that no resolver takes for an address."""
    try:
        ipaddress.ip_address(host)
        return "%" not in host
    except ValueError:
        return bool(_NAME.fullmatch(host)) and not _NUMBER.fullmatch(host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
