"""The client's address in `X-Forwarded-For`, and the name under which an address is counted."""

import logging

import pytest

from service import addresses, forwarded
from service.forwarded import ForwardedFor

PROXIES = {"10.0.0.1", "10.0.0.2"}
PEER = "10.0.0.1"


def client(*values: str) -> str:
    return ForwardedFor(PROXIES, trust_all=False).client(values, PEER)


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        (" 192.0.2.7:5678 ", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::FFFF:c000:0207", "192.0.2.7"),
        ("[::ffff:192.0.2.7]:80", "192.0.2.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_every_spelling_of_an_address_is_the_same_address(entry: str, address: str) -> None:
    assert forwarded.parse(entry) == address


@pytest.mark.parametrize(
    "entry",
    ["", "unknown", "_proxy", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4:", "1.2.3.4:port", "[::1",
     "::1]", "[]", "[::1]x", "2001:db8::1:443:x", "1.2.3.4, 5.6.7.8", "١.2.3.4", "1" * 1000],
)  # fmt: skip
def test_other_text_is_no_address(entry: str) -> None:
    assert forwarded.parse(entry) is None


def test_the_client_is_the_last_address_that_is_no_proxys() -> None:
    assert client("192.0.2.7") == "192.0.2.7"
    assert client("198.51.100.1, 192.0.2.7, ::ffff:10.0.0.2") == "192.0.2.7"
    assert client("198.51.100.1, 192.0.2.7", "10.0.0.2:99,") == "192.0.2.7"
    assert client("10.0.0.2, 10.0.0.1") == "10.0.0.2"
    assert client("", ",") == PEER


def test_if_every_peer_is_trusted_the_client_is_the_first_address() -> None:
    every = ForwardedFor(PROXIES, trust_all=True)
    assert every.client(["192.0.2.7:1, 198.51.100.1"], PEER) == "192.0.2.7"
    assert every.client(["nobody, 198.51.100.1"], PEER) == PEER


def test_a_request_with_other_text_counts_as_one_of_the_proxy_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    finder = ForwardedFor(PROXIES, trust_all=False)
    for n in range(1000):
        assert finder.client([f"192.0.2.7, caller-{n}"], PEER) == PEER
    assert finder.client(["caller, 192.0.2.7"], PEER) == "192.0.2.7"  # its own proxy wrote that
    [record] = caplog.records
    assert "'caller-0', which is no IP address" in record.getMessage()


def test_one_caller_is_an_ipv4_address_or_a_network_of_ipv6() -> None:
    names = {addresses.network(f"2001:db8:1:2:{n:x}::{n:x}") for n in range(100)}
    assert names == {"2001:db8:1:2::/64"}
    assert addresses.network("2001:db8:1:3::1") == "2001:db8:1:3::/64"
    assert addresses.network("::ffff:192.0.2.7") == "192.0.2.7"
    assert addresses.network("192.0.2.7") != addresses.network("192.0.2.8")
