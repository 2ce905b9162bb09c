"""IP addresses of clients, in the spelling in which they are compared and counted."""

import ipaddress
from functools import lru_cache

MAX_LENGTH = 64
"""Longest name of a client that is kept: proxies may write other names than addresses."""


@lru_cache(4096)
def plain(host: str) -> str:
    """Return an address without a zone, and as IPv4 if it is mapped into IPv6.

    Text that is no address is returned as it is, up to `MAX_LENGTH`.
    """
    try:
        address = ipaddress.ip_address(host[:MAX_LENGTH].partition("%")[0])
    except ValueError:
        return host[:MAX_LENGTH]
    return str(getattr(address, "ipv4_mapped", None) or address)


@lru_cache(4096)
def network(host: str) -> str:
    """Return what stands for one client: an IPv4 address, or the /64 of an IPv6 address.

    A host has a whole /64 and may change its address at will.
    """
    address = plain(host)
    if ":" not in address or address == "::1":
        return address
    try:
        return str(ipaddress.ip_network(f"{address}/64", strict=False))
    except ValueError:
        return address
