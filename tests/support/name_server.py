"""A DNS server on the loopback whose answers change, and a client for it."""

import contextlib
import ipaddress
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEADER = struct.Struct(">6H")
_ANSWER, _RECURSION = 0x8000, 0x0100
_A, _IN = 1, 1


@dataclass
class NameServer:
    """Answers queries for IPv4 addresses, each with the next of `answers`, valid for 0 seconds."""

    answers: Iterator[str]
    port: int = 0
    queries: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def serving(self) -> Iterator["NameServer"]:
        """Answer on UDP until the block ends."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            self.port = server.getsockname()[1]
            thread = threading.Thread(target=self._serve, args=(server,))
            thread.start()
            try:
                yield self
            finally:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                    last.sendto(b"", ("127.0.0.1", self.port))
                thread.join()

    def _serve(self, server: socket.socket) -> None:
        while True:
            query, client = server.recvfrom(512)
            if not query:
                return
            number = _HEADER.unpack_from(query)[0]
            question = query[_HEADER.size :]
            self.queries.append(_name(question))
            head = _HEADER.pack(number, _ANSWER | _RECURSION, 1, 1, 0, 0)
            address = ipaddress.IPv4Address(next(self.answers)).packed
            record = struct.pack(">HHHIH", 0xC00C, _A, _IN, 0, 4) + address
            server.sendto(head + question + record, client)

    def resolve(self, host: str) -> list[str]:
        """Ask this server for a host's address, as a resolver without a cache does."""
        labels = b"".join(bytes([len(x)]) + x.encode() for x in host.split("."))
        question = labels + b"\0" + struct.pack(">HH", _A, _IN)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(
                _HEADER.pack(7, _RECURSION, 1, 0, 0, 0) + question, ("127.0.0.1", self.port)
            )
            reply = client.recv(512)
        return [str(ipaddress.IPv4Address(reply[-4:]))]


def _name(question: bytes) -> str:
    labels, at = [], 0
    while question[at]:
        labels.append(question[at + 1 : at + 1 + question[at]].decode())
        at += 1 + question[at]
    return ".".join(labels)
