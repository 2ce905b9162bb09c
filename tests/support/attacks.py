"""What attacks on a running service share: the target, and raw connections to it."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

ATTACKER = "127.0.0.2"
"""Address from which attacks connect. The service trusts only 127.0.0.1, as a proxy."""


@dataclass(frozen=True)
class Target:
    """The service under attack, and until when to attack it (monotonic)."""

    port: int
    until: float

    def running(self) -> bool:
        """Whether the attack shall go on."""
        return time.monotonic() < self.until

    def connect(self, address: str = ATTACKER) -> socket.socket:
        """Connect from `address`."""
        return socket.create_connection(("127.0.0.1", self.port), 10, (address, 0))

    @contextlib.contextmanager
    def connections(self, count: int) -> Iterator[list[socket.socket]]:
        """Up to `count` open connections; those that the service refuses are left out."""
        with contextlib.ExitStack() as opened:
            sockets = []
            for _ in range(count):
                with contextlib.suppress(OSError):
                    sockets.append(opened.enter_context(self.connect()))
            yield sockets


@dataclass(frozen=True)
class Attack:
    """An attack, and what the service may need while it lasts."""

    run: Callable[[Target], str]
    """Attacks until `Target.running()` is false; returns what happened, in one line. It runs in a
    process of its own, which is killed if it does not return."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment of the service. Attacks with the same one share a service."""
    budget_mb: float = 0.0
    """Memory that the service may use in addition to 1.3 times its idle memory."""


def send(connection: socket.socket, data: bytes) -> bool:
    """Send all of `data`; False if the service has closed the connection."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def receive(connection: socket.socket, pause_s: float = 2) -> bytes:
    """Return what the service sends until it closes the connection or pauses for so long."""
    received = b""
    connection.settimeout(pause_s)
    with contextlib.suppress(OSError):
        while data := connection.recv(2**16):
            received += data
    return received
