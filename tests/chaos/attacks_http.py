"""Attacks by HTTP requests that need no API key: on headers, connections and bodies."""

import time

from tests.support.attacks import Attack, Target, receive, send

HEAD = b"POST /v1/decodes HTTP/1.1\r\nHost: localhost\r\n"


def header_lines(target: Target) -> str:
    """Six connections that send 64 MiB of short header lines each."""
    lines, sent, answers = b"a:b\r\n" * 13_000, 0, set()
    while target.running():
        with target.connections(6) as connections:
            for _ in range(1024):
                sent += sum(send(c, lines) for c in connections)
                if not target.running() or not any(send(c, lines) for c in connections):
                    break
            answers |= {receive(c)[9:12] for c in connections}
    return f"{sent * len(lines) / 2**20:.0f} MiB of header lines sent; answers {answers}"


def slow_headers(target: Target) -> str:
    """Connections that send one header line per second, or nothing."""
    with target.connections(1000) as connections:
        opened = len(connections)
        for connection in connections:
            send(connection, HEAD)
        while target.running():
            connections = [c for c in connections if send(c, b"a:b\r\n")]
            time.sleep(1)
    return f"{opened} connections opened, {len(connections)} open at the end"


ATTACKS = {
    "header-lines": Attack(header_lines),
    "slow-headers": Attack(slow_headers),
}
