"""A request to addresses that were checked, within one deadline, of whose answer little is read.

httpcore asks a network backend for its connections. Ours dials the given addresses and never a
name, whereas TLS still names the host (SNI) and verifies the certificate against it. httpcore
itself follows no redirect, keeps no cookie and reads no proxy from the environment.
"""

import contextlib
import email.utils
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import httpcore

from worker.webhooks.url_guard import Target

CONNECT_S = 4.0
"""How long one address may take to accept a connection, so that another still has its turn."""
READ = 1024
"""Bytes that are taken from a connection at once; of a body, not more than that."""
MAX_READ = 32 * 1024
"""Bytes that are taken from a connection in all: a status, headers, and what came with them."""

NETWORK_ERRORS = (
    httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError
)  # fmt: skip
"""What `post` may raise."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is looked at of a response."""

    status: int
    retry_after_s: float  # 0 where it does not say


def post(
    target: Target, body: bytes, headers: Mapping[str, str], tls: ssl.SSLContext, timeout_s: float
) -> Answer:
    """POST to one of the target's addresses; all of it, TLS included, takes `timeout_s` at most.

    Raises one of `NETWORK_ERRORS`.
    """
    url = httpcore.URL(  # of the parts, so that nobody reads the text differently than the check
        scheme=target.scheme.encode(), host=target.host.encode(), port=target.port,
        target=target.path,
    )  # fmt: skip
    sent = {"Host": target.authority, "Connection": "close", **headers}
    pinned = Pinned(target.addresses, time.monotonic() + timeout_s)
    with (
        httpcore.ConnectionPool(ssl_context=tls, network_backend=pinned) as pool,
        pool.stream("POST", url, headers=list(sent.items()), content=body) as response,
    ):
        with contextlib.suppress(*NETWORK_ERRORS):  # who is hung up on while sending may complain
            next(iter(response.iter_stream()), b"")
        return Answer(response.status, _retry_after_s(response.headers))


def _retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float:
    """Seconds that Retry-After names, or until the date it names; else 0."""
    text = next((v.decode("latin-1") for k, v in headers if k.lower() == b"retry-after"), "")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with contextlib.suppress(ValueError, OverflowError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


class Pinned(httpcore.NetworkBackend):
    """Connects to the given addresses, whatever the name; everything until one deadline."""

    def __init__(self, addresses: Iterable[str], deadline: float) -> None:
        self.addresses, self.deadline = tuple(addresses), deadline  # of time.monotonic()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self.addresses:
            seconds = min(_left(self.deadline), CONNECT_S)
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, port, seconds)
                return _Limited(stream, self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as e:
                failure = e
        raise failure


class _Limited(httpcore.NetworkStream):
    """A connection that ends at a deadline and after `MAX_READ` bytes, however it drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream, self.deadline, self.taken = stream, deadline, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self.stream.read(min(max_bytes, READ), _left(self.deadline))
        self.taken += len(data)
        if self.taken > MAX_READ:
            raise httpcore.ReadError(f"more than {MAX_READ} bytes of headers")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, _left(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        try:
            left = _left(self.deadline)
        except httpcore.ReadTimeout:
            self.close()
            raise
        return _Limited(self.stream.start_tls(ssl_context, server_hostname, left), self.deadline)

    def get_extra_info(self, info: str) -> object:
        return self.stream.get_extra_info(info)


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("its time is over")
    return seconds
