"""Attacks by HTTP requests that need no API key: on headers, connections and bodies."""

import contextlib
import re
import socket
import time
from collections import Counter
from pathlib import Path

from tests.support.attacks import Attack, Target, receive, send

HEAD = b"POST /v1/decodes HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BITSTREAM = Path(__file__).parents[1] / "data/kodim23.msh"


def _flood(target: Target, begin: bytes, more: bytes, end: bytes = b"") -> str:
    """Six connections that begin a request and go on with it until they are closed, again and
    again. With `end`, `more` is sent once, and then `end`."""
    sent, answers = 0, Counter[str]()
    while target.running():
        with target.connections(6) as connections:
            for connection in connections:
                send(connection, begin)
            open_ones, rounds = connections, 0
            while open_ones and target.running() and rounds < (1 if end else 1024):
                open_ones = [c for c in open_ones if send(c, more)]
                sent += len(open_ones) * len(more)
                rounds += 1
            for connection in open_ones:
                send(connection, end)
            answers.update(receive(c)[9:12].decode() or "closed" for c in connections)
    return f"{sent / 2**20:.0f} MiB sent; answers {dict(answers)}"


def header_lines(target: Target) -> str:
    """Endless short header lines."""
    return _flood(target, HEAD, b"a:b\r\n" * 13_000)


def many_header_lines(target: Target) -> str:
    """Heads of 60,000 lines, complete when they arrive."""
    return _flood(target, HEAD, b"a:b\r\n" * 60_000, b"\r\n")


def one_header(target: Target) -> str:
    """An endless header."""
    return _flood(target, HEAD + b"A: ", b"a" * 2**16)


def request_line(target: Target) -> str:
    """An endless request line."""
    return _flood(target, b"GET /", b"a" * 2**16)


def trailers(target: Target) -> str:
    """Endless trailers of a chunked body."""
    return _flood(target, CHUNKED + b"0\r\n", b"a:b\r\n" * 13_000)


def chunk_extensions(target: Target) -> str:
    """Chunks of one byte with extensions of 60 KB."""
    return _flood(target, CHUNKED, (b"1;" + b"a" * 60_000 + b"\r\nX\r\n") * 4)


def small_chunks(target: Target) -> str:
    """A body in chunks of one byte."""
    return _flood(target, CHUNKED, b"1\r\nX\r\n" * 40_000)


def unread_body(target: Target) -> str:
    """An endless body of a request that is refused at once."""
    length = b"Content-Length: 99999999999\r\n\r\n"
    return _flood(target, HEAD + length, b"a" * 2**16)


def pipelined(target: Target) -> str:
    """Thousands of requests at once, and no response is read."""
    requests, sent = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000, 0
    with target.connections(6) as connections:
        for connection in connections:
            connection.setblocking(False)
        while target.running():
            for connection in connections:
                with contextlib.suppress(OSError):
                    sent += connection.send(requests)
            time.sleep(0.01)
    return f"{sent / 2**10:.0f} KiB sent"


def slow_headers(target: Target) -> str:
    """Connections that send one header line per second, or nothing."""
    with target.connections(1000) as connections:
        opened = len(connections)
        for number, connection in enumerate(connections):
            send(connection, HEAD if number % 2 else b"")
        while target.running():
            connections = [
                c for n, c in enumerate(connections) if send(c, b"a:b\r\n" if n % 2 else b"")
            ]
            time.sleep(1)
        return f"{opened} connections opened, {_still_open(connections)} open at the end"


def large_heads(target: Target) -> str:
    """1000 connections that each keep 60 KB of an incomplete head in the service's memory."""
    with target.connections(1000) as connections:
        opened = len(connections)
        for connection in connections:
            send(connection, HEAD + b"A: " + b"a" * 60_000)
        while target.running():
            time.sleep(0.5)
        return f"{opened} connections opened, {_still_open(connections)} open at the end"


def slow_bodies(target: Target) -> str:
    """200 bodies that arrive byte by byte."""
    length = b"Content-Length: 100000\r\n\r\n"
    with target.connections(200) as connections:
        for connection in connections:
            send(connection, HEAD + length)
        while target.running():
            connections = [c for c in connections if send(c, b"a")]
            time.sleep(0.5)
        return f"{_still_open(connections)} of 200 connections open after the body's timeout"


def unread_responses(target: Target) -> str:
    """200 clients that ask for a file of 1 MB and do not read it."""
    path = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with target.connections(200) as connections:
        for connection in connections:
            send(connection, path)
        while target.running():
            time.sleep(0.5)
    return f"{len(connections)} files requested"


def long_values(target: Target) -> str:
    """Headers of 60 KB whose values are lists or quoted, and queries of 60 KB."""
    values = (b",", b'"', b"a;", b'"\\', b"a=b,", b" ", b"a&", b"utm_a=1&", b"%41")
    names = (
        b"Accept", b"Prefer", b"Content-Type", b"If-None-Match", b"Range", b"Forwarded",
        b"X-Forwarded-For", b"Accept-Language", b"Cookie", b"Authorization", b"traceparent",
        b"tracestate", b"Origin", b"Connection", b"Expect", b"Last-Event-ID", b"Idempotency-Key",
    )  # fmt: skip
    answers = Counter[str]()
    while target.running():
        for value in values:
            long = (value * 60_000)[:60_000]
            requests = [HEAD + name + b": a" + long + b"z\r\n" for name in names]
            requests.append(HEAD + b"Content-Type: multipart/form-data; " + long + b"\r\n")
            requests.append(b"POST /v1/decodes?" + long.replace(b" ", b"+").replace(b'"', b"%22")
                            + b" HTTP/1.1\r\nHost: localhost\r\n")  # fmt: skip
            for request in requests:
                with contextlib.suppress(OSError), target.connect() as connection:
                    send(connection, request + b"Connection: close\r\n\r\n")
                    answers[receive(connection)[9:12].decode()] += 1
    return f"{answers.total()} requests; answers {dict(answers)}"


def hostile_forms(target: Target) -> str:
    """Multipart forms of 8 MB with many parts, headers or almost-boundaries."""
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n'
    bodies = [
        part * 120_000,
        b"--b\r\n" + b"A: b\r\n" * 1_300_000 + b"\r\n--b--",
        part + b"\r\n--" * 2_000_000 + b"\r\n--b--",
        part + b"\r" * 8_000_000 + b"\r\n--b--",
    ]
    form = HEAD + b"Content-Type: multipart/form-data; boundary=b\r\n"
    answers = Counter[str]()
    while target.running():
        for body in bodies:
            with contextlib.suppress(OSError), target.connect() as connection:
                length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
                send(connection, form + length + body)
                answers[receive(connection)[9:12].decode()] += 1
    return f"answers {dict(answers)}"


def listeners(target: Target) -> str:
    """1000 listeners to the events of one job."""
    data = BITSTREAM.read_bytes()
    with target.connect() as connection:
        path = (
            b"POST /v1/decodes?tier=ddpm-1000 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        )
        send(connection, path + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        found = re.search(rb"location: (\S+)", receive(connection, 10), re.IGNORECASE)
    if found is None:
        return "the job was not queued"
    with target.connections(1000) as connections:
        for connection in connections:
            send(connection, b"GET %s/events HTTP/1.1\r\nHost: localhost\r\n\r\n" % found[1])
        while target.running():
            time.sleep(0.5)
        opened = _still_open(connections)
    with target.connect("127.0.0.3") as connection:
        send(connection, b"DELETE %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % found[1])
    return f"{opened} of 1000 listeners open at the end"


def _still_open(connections: list[socket.socket]) -> int:
    """How many connections the service has not closed."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            while connection.recv(2**16):
                pass
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


ATTACKS = {
    "header-lines": Attack(header_lines),
    "many-header-lines": Attack(many_header_lines),
    "one-header": Attack(one_header),
    "request-line": Attack(request_line),
    "trailers": Attack(trailers),
    "chunk-extensions": Attack(chunk_extensions),
    "small-chunks": Attack(small_chunks),
    "unread-body": Attack(unread_body),
    "pipelined": Attack(pipelined),
    "slow-headers": Attack(slow_headers),
    "large-heads": Attack(large_heads),
    "slow-bodies": Attack(slow_bodies, {"AFTERIMAGE_BODY_TIMEOUT_S": "5"}),
    "unread-responses": Attack(unread_responses),
    "long-values": Attack(long_values),
    "hostile-forms": Attack(hostile_forms),
    "listeners": Attack(listeners),
}
