"""The sockets on which `afterimage serve` listens, and the address that it prints."""

import contextlib
import errno
import socket
from typing import Any

from models.errors import AfterimageError

_EVERYWHERE = {"0.0.0.0": ("127.0.0.1", "IPv4"), "::": ("::1", "IPv6")}
"""Hosts that stand for all addresses: one that can be visited, and the kind of the addresses."""
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of an address that this machine does not have."""


class CannotListen(AfterimageError):
    """The host and port cannot be bound."""


def bind(host: str, port: int, option: str = "--port") -> list[socket.socket]:
    """Bind a socket to every address of `host`; for port 0, all to one port that is free.

    Connections are refused until a server listens on the sockets. Raises `CannotListen`, whose
    message says what to do; `option` names the setting of the port.
    """
    if not 0 <= port <= 65535:
        raise CannotListen(f"{option} is {port}; choose a port from 0 to 65535")
    addresses = _addresses(host, port)
    refusal: OSError | None = None
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, address in addresses:
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(
                    opened.enter_context(_bound(family, (address[0], chosen, *address[2:])))
                )
            except OSError as e:
                refusal = e
                if e.errno not in _NOT_HERE:
                    break
        if sockets and (refusal is None or refusal.errno in _NOT_HERE):
            opened.pop_all()
            return sockets
    if refusal is not None and refusal.errno == errno.EADDRINUSE:
        raise in_use(host, port, option)
    reason = refusal.strerror if refusal is not None else "no address"
    raise CannotListen(
        f"cannot listen on port {port} of {host} ({reason}); choose another host, or another port "
        f"with {option}"
    )


def in_use(host: str, port: int, option: str = "--port") -> CannotListen:
    """Return the error for a port on which another program listens."""
    return CannotListen(
        f"port {port} of {host} is in use; choose another with {option}, or stop the program that "
        "listens on it"
    )


def address(sockets: list[socket.socket]) -> str:
    """Return a URL that leads to the first socket from this machine.

    A note follows if the socket listens on all addresses.
    """
    host, port = sockets[0].getsockname()[:2]
    visited, kind = _EVERYWHERE.get(host, (host, ""))
    url = f"http://[{visited}]:{port}" if ":" in visited else f"http://{visited}:{port}"
    return f"{url} (on all {kind} addresses)" if kind else url


def _addresses(host: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
    """Return each address family and address of `host` once. Raises `CannotListen`."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as e:
        raise CannotListen(f"the host {host!r} has no address ({e}); choose another host") from None
    return list(dict.fromkeys((entry[0], entry[4]) for entry in found))


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
