"""The client's address in `X-Forwarded-For`, which proxies write."""

import ipaddress
import logging
import re
import time
from collections.abc import Container, Iterable

from service import addresses

WARN_S = 60.0
"""Minimum seconds between two log lines about values that are no addresses."""
MAX_LOGGED = 64
"""Length to which such a value is cut in the log."""

_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d{1,5})?|([\d.]+):\d{1,5}", re.ASCII)

log = logging.getLogger(__name__)


def parse(text: str) -> str | None:
    """Return the IP address in an entry of `X-Forwarded-For`; None if it holds none.

    An entry may have a port, brackets around an IPv6 address, or a zone, all of which are removed.
    An IPv4 address that is mapped into IPv6 is returned as IPv4.
    """
    entry = text.strip()
    if match := _WITH_PORT.fullmatch(entry):
        entry = match[1] or match[2] or ""
    address = addresses.plain(entry)
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return None
    return address


class ForwardedFor:
    """Finds the client's address; `trusted` contains the addresses of proxies."""

    def __init__(self, trusted: Container[str], trust_all: bool) -> None:
        self._trusted, self._trust_all = trusted, trust_all
        self._warned_at = -WARN_S

    def client(self, values: Iterable[str], peer: str) -> str:
        """Return the client's address from the headers that the proxy `peer` has sent.

        It is the last entry that is not a proxy's own, or the first if all are, or if every peer is
        trusted. If an entry that is read is no address, returns `peer` and logs a warning: any text
        would count as a caller of its own.
        """
        entries = [entry for value in values for entry in value.split(",") if entry.strip()]
        if self._trust_all:
            entries = entries[:1]
        address = peer
        for entry in reversed(entries):
            found = parse(entry)
            if found is None:
                self._warn(entry, peer)
                return peer
            address = found
            if address not in self._trusted:
                break
        return address

    def _warn(self, entry: str, peer: str) -> None:
        now = time.monotonic()
        if now - self._warned_at >= WARN_S:
            self._warned_at = now
            text = (
                "X-Forwarded-For from the proxy %s holds %r, which is no IP address, so its request"
                " counts as one of %s; let the proxy write addresses only"
            )
            log.warning(text, peer, entry.strip()[:MAX_LOGGED], peer)
