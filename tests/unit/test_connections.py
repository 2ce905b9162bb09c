"""The limits of connections."""

import resource
from collections.abc import Iterator

import pytest

from service.cli import connections
from service.cli.connections import Connections
from service.settings import ServiceSettings


@pytest.fixture
def file_limit() -> Iterator[None]:
    """Restore the limit of open files after the test."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_addresses_of_one_ipv6_network_share_their_connections() -> None:
    limits = Connections(10, per_address=2, total=100)
    assert [limits.add(f"2001:db8::{n}") for n in range(3)] == ["", "", "address"]
    assert limits.add("2001:db8:0:1::1") == ""
    limits.remove("2001:db8::0")
    limits.remove("2001:db8::1")
    assert limits.add("2001:db8::9") == ""


def test_a_mapped_ipv4_address_is_counted_as_the_address_itself() -> None:
    limits = Connections(10, per_address=1, total=100)
    assert [limits.add(host) for host in ("192.0.2.7", "::ffff:192.0.2.7")] == ["", "address"]


def test_the_number_of_connections_leaves_files_for_the_rest(file_limit: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    limits = connections.limited(ServiceSettings(connections=4096))
    assert limits.total + connections.RESERVE == 1024
    assert connections.limited(ServiceSettings(connections=100)).total == 100


def test_the_limit_of_open_files_is_raised_to_what_is_needed(file_limit: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    connections.raise_file_limit(ServiceSettings(connections=200))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(712, hard), hard)
    connections.raise_file_limit(ServiceSettings(connections=100))  # never lowered
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(712, hard), hard)
