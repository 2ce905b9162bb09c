"""Limits of connections: how many, from one address and in all, and how long each may stall."""

import contextlib
import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, Protocol

from service import addresses
from service.settings import ServiceSettings

RESERVE = 512
"""File descriptors kept for Redis, models, child processes and the log."""
FLUSH_S = 10.0
"""How long a closed connection may take to send what is left in its buffer."""


class Trusted(Protocol):
    """The addresses of trusted proxies."""

    def __contains__(self, host: str, /) -> bool:
        """Whether `host` is one of them."""


@dataclass(slots=True)
class Connections:
    """Counts the connections of an API process and decides whether one more may be served."""

    header_timeout_s: float
    per_address: int
    total: int
    trusted: Trusted = ()
    """Proxies, which are exempt from `per_address`."""
    open: int = 0
    accepted: int = 0
    """All connections so far."""
    _of: Counter[str] = field(default_factory=Counter)

    def add(self, host: str) -> Literal["", "address", "total"]:
        """Count a connection; return the limit that it exceeds, if any."""
        client = addresses.network(host)
        self.open += 1
        self.accepted += 1
        self._of[client] += 1
        if self._of[client] > self.per_address and host not in self.trusted:
            return "address"
        return "total" if self.open > self.total else ""

    def remove(self, host: str) -> None:
        """Stop counting a connection that has ended."""
        client = addresses.network(host)
        self.open -= 1
        self._of[client] -= 1
        if not self._of[client]:
            del self._of[client]


def limited(settings: ServiceSettings, trusted: Trusted = ()) -> Connections:
    """Return the limits from `settings`, lowered to what the limit of open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    total = settings.connections
    if soft != resource.RLIM_INFINITY:
        total = max(min(total, soft - RESERVE), 1)
    return Connections(settings.header_timeout_s, settings.connections_per_address, total, trusted)


def raise_file_limit(settings: ServiceSettings) -> None:
    """Raise the soft limit of open files to what the connections need, or to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = RESERVE + settings.connections
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
