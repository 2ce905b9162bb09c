"""Limits of what h11 parses. The only module that uses private names of h11."""

import re
from typing import Any

import h11
from h11._readers import ChunkedReader

from service.requests import MAX_HEADER_BYTES, MAX_HEADER_LINES

SLICE, FIRST_SLICE = 2**12, 2**14
"""Bytes of a chunked body, and of what may begin with a head, that are parsed at a time, so that
trailers beyond the limit are noticed before all are parsed."""
SMALL_CHUNKS, CHUNK_BYTES = 1024, 64
"""Chunks of any size that a body may have, and the mean size that is required of more: each chunk
costs as much time as a header line."""
_END_OF_HEAD = re.compile(rb"\n\r?\n")


class Parser(h11.Connection):
    """H11's parser with limits of the lines of heads and trailers, and of the number of chunks.

    H11 itself limits bytes only, and only of what is incomplete. Empty lines before a request are
    skipped, and the connection is closed after a request that has two lengths (RFC 9112, 2.2, 6.1).
    """

    _chunks = _chunked_bytes = 0

    def slice(self, size: int) -> int:
        """How many of the next `size` bytes may be parsed at a time."""
        if self.their_state is h11.IDLE:
            return min(size, FIRST_SLICE)
        return min(size, SLICE) if isinstance(self._reader, ChunkedReader) else size

    def _extract_next_receive_event(self) -> Any:
        reader = self._reader
        if self.their_state is h11.IDLE:
            self._skip_empty_lines()
            self._check_lines()
            self._chunks = self._chunked_bytes = 0
        elif isinstance(reader, ChunkedReader) and reader._reading_trailer:
            self._check_lines()
        event = super()._extract_next_receive_event()
        if type(event) is h11.Request:
            self._check_request(event)
        elif event is h11.NEED_DATA and isinstance(reader, ChunkedReader):
            if len(self._receive_buffer) > SLICE and not reader._reading_trailer:
                raise h11.RemoteProtocolError(f"a chunk's extension exceeds {SLICE} bytes")
        elif type(event) is h11.Data and isinstance(reader, ChunkedReader):
            self._chunks += event.chunk_start
            self._chunked_bytes += len(event.data)
            if self._chunks > SMALL_CHUNKS + self._chunked_bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError(
                    f"the body has {self._chunks} chunks in {self._chunked_bytes} bytes; "
                    f"send chunks of {CHUNK_BYTES} bytes or more"
                )
        return event

    def _skip_empty_lines(self) -> None:
        received = self._receive_buffer._data
        if received.startswith((b"\r", b"\n")):
            self._receive_buffer.maybe_extract_at_most(
                len(received) - len(received.lstrip(b"\r\n"))
            )

    def _check_request(self, request: h11.Request) -> None:
        """Raise `RemoteProtocolError` for a version of HTTP other than 1.x."""
        if not request.http_version.startswith(b"1."):
            version = request.http_version.decode()
            raise h11.RemoteProtocolError(f"use HTTP/1.1, not {version}", error_status_hint=505)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            self._cstate.process_keep_alive_disabled()

    def _check_lines(self) -> None:
        """Raise `RemoteProtocolError` if the lines in the buffer exceed a limit."""
        received = self._receive_buffer._data
        if len(received) <= MAX_HEADER_LINES:
            return
        end = _END_OF_HEAD.search(received, 0, MAX_HEADER_BYTES)
        if end is None and len(received) > MAX_HEADER_BYTES:
            raise h11.RemoteProtocolError("too many bytes", error_status_hint=431)
        size = end.end() if end else len(received)
        if received.count(b"\n", 0, size) > MAX_HEADER_LINES:
            raise h11.RemoteProtocolError("too many lines", error_status_hint=431)
