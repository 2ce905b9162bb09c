"""An HTTP POST to addresses that were checked before, with one deadline and a small read limit.

httpcore gets its connections from a network backend. The backend here dials the checked addresses
and never resolves a name; TLS still sends the host name (SNI) and verifies the certificate against
it. httpcore follows no redirects, keeps no cookies and reads no proxy settings.
"""

import contextlib
import email.utils
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import httpcore

from worker.webhooks.url_guard import Target

CONNECT_TIMEOUT_S = 4.0
"""Timeout of connecting to one address; leaves time to try the next."""
READ_BYTES = 1024
"""Size of one read from a connection. Only one read of the response's body is made."""
MAX_READ_BYTES = 32 * 1024
"""Limit on all bytes read from a connection: status, headers, and body bytes read with them."""

NETWORK_ERRORS = (
    httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError
)  # fmt: skip
"""What `post` may raise."""


@dataclass(frozen=True, slots=True)
class Response:
    """Status and Retry-After of a response; the rest is ignored."""

    status: int
    retry_after_s: float  # 0 without the header


def post(
    target: Target, body: bytes, headers: Mapping[str, str], tls: ssl.SSLContext, timeout_s: float
) -> Response:
    """POST to the first of the target's addresses that accepts the connection.

    `timeout_s` limits the whole exchange, including TLS. Raises one of `NETWORK_ERRORS`.
    """
    url = httpcore.URL(  # from the checked parts: parsing the text again could give another host
        scheme=target.scheme.encode(), host=target.host.encode(), port=target.port,
        target=target.path,
    )  # fmt: skip
    all_headers = {"Host": target.authority, "Connection": "close", **headers}
    backend = PinnedBackend(target.addresses, time.monotonic() + timeout_s)
    with (
        httpcore.ConnectionPool(ssl_context=tls, network_backend=backend) as pool,
        pool.stream("POST", url, headers=list(all_headers.items()), content=body) as response,
    ):
        # read once: if the connection is closed during a send, the server may raise an error
        with contextlib.suppress(*NETWORK_ERRORS):
            next(iter(response.iter_stream()), b"")
        return Response(response.status, _retry_after_s(response.headers))


def _retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float:
    """Retry-After, seconds or a date, as seconds from now; 0 without a valid one."""
    text = next((v.decode("latin-1") for k, v in headers if k.lower() == b"retry-after"), "")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with contextlib.suppress(ValueError, OverflowError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


class PinnedBackend(httpcore.NetworkBackend):
    """Connects to the given addresses, whatever the host name, within a deadline."""

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
        """Connect to the first address that accepts; `host` is ignored."""
        failure: Exception = httpcore.ConnectError("no address to connect to")
        for address in self.addresses:
            seconds = min(_remaining_s(self.deadline), CONNECT_TIMEOUT_S)
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, port, seconds)
                return _LimitedStream(stream, self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as e:
                failure = e
        raise failure


class _LimitedStream(httpcore.NetworkStream):
    """A connection with a deadline, of which at most `MAX_READ_BYTES` are read."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream, self.deadline, self.bytes_read = stream, deadline, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self.stream.read(min(max_bytes, READ_BYTES), _remaining_s(self.deadline))
        self.bytes_read += len(data)
        if self.bytes_read > MAX_READ_BYTES:
            raise httpcore.ReadError(f"the server sent over {MAX_READ_BYTES} bytes of headers")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, _remaining_s(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        try:
            seconds = _remaining_s(self.deadline)
        except httpcore.ReadTimeout:
            self.close()
            raise
        stream = self.stream.start_tls(ssl_context, server_hostname, seconds)
        return _LimitedStream(stream, self.deadline)

    def get_extra_info(self, info: str) -> object:
        return self.stream.get_extra_info(info)


def _remaining_s(deadline: float) -> float:
    """Seconds until the deadline. Raises `httpcore.ReadTimeout` after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the request exceeded its timeout")
    return seconds
