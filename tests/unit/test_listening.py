"""The sockets of `afterimage serve` and the address that it prints."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from service.cli import listening, main
from service.cli.listening import CannotListen


@contextlib.contextmanager
def bound(host: str, port: int = 0) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(s) for s in listening.bind(host, port)]


def has_ipv6() -> bool:
    with contextlib.suppress(CannotListen), bound("::1"):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which a program listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "printed"),
    [
        ("127.0.0.1", "http://127.0.0.1:{port}"),
        ("0.0.0.0", "http://127.0.0.1:{port} (on all IPv4 addresses)"),
        pytest.param("::1", "http://[::1]:{port}", marks=needs_ipv6),
        pytest.param("::", "http://[::1]:{port} (on all IPv6 addresses)", marks=needs_ipv6),
    ],
)
def test_the_printed_address_can_be_visited(host: str, printed: str) -> None:
    with bound(host) as sockets:
        port = sockets[0].getsockname()[1]
        assert port
        printed = printed.format(port=port)
        assert listening.address(sockets) == printed
        sockets[0].listen()
        visited = printed.split()[0].removeprefix("http://").rpartition(":")[0].strip("[]")
        socket.create_connection((visited, port), timeout=5).close()


def test_all_addresses_of_a_name_get_the_same_port() -> None:
    with bound("localhost") as sockets:
        assert len({s.getsockname()[1] for s in sockets}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_named_with_its_option(taken: int, host: str) -> None:
    with pytest.raises(CannotListen, match=f"port {taken} .* is in use; choose another with --po"):
        listening.bind(host, taken)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "--port is 65536; choose a port from 0 to 65535"),
        ("127.0.0.1", -1, "--port is -1"),
        ("nothing.invalid", 0, "the host 'nothing.invalid' has no address"),
        ("192.0.2.1", 0, "192.0.2.1 .*choose another host"),
    ],
)
def test_what_cannot_be_bound_is_refused(host: str, port: int, message: str) -> None:
    with pytest.raises(CannotListen, match=message):
        listening.bind(host, port)


@pytest.mark.parametrize("separate", [False, True])
def test_serve_reports_a_port_in_use_before_it_starts_anything(
    taken: int,
    separate: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("AFTERIMAGE_METRICS_PORT", str(taken if separate else 0))
    port = 0 if separate else taken
    with mock.patch.dict(os.environ):
        assert main.main(["serve", "--port", str(port), "--workers", "0"]) == 1
    captured = capsys.readouterr()
    option = "AFTERIMAGE_METRICS_PORT" if separate else "--port"
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"afterimage: port {taken} of 127.0.0.1 is in use")
    assert option in line
