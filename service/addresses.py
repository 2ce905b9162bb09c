"""Normalises the IP addresses of clients, so that they can be compared and counted."""

import ipaddress
from functools import lru_cache

MAX_LENGTH = 64
"""Length to which a client's name is cut: it may be other text than an address."""


@lru_cache(4096)
def parse(text: str) -> str | None:
    """Return an IP address without its zone, and as IPv4 if it is mapped into IPv6.

    None if the text is not an address.
    """
    try:
        address = ipaddress.ip_address(text[:MAX_LENGTH].partition("%")[0])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def plain(host: str) -> str:
    """Return an address as `parse` does; other text unchanged, up to `MAX_LENGTH`."""
    return parse(host) or host[:MAX_LENGTH]


def is_loopback(host: str) -> bool:
    """Whether an address is that of this machine itself; False for other text."""
    address = parse(host)
    return address is not None and ipaddress.ip_address(address).is_loopback


@lru_cache(4096)
def network(host: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or the /64 of an IPv6 address.

    A host can use any address of its /64, so counting addresses would not limit it.
    """
    address = parse(host)
    if address is None or ":" not in address or address == "::1":
        return plain(host)
    return str(ipaddress.ip_network(f"{address}/64", strict=False))
