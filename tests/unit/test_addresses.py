"""Addresses as they are counted."""

import pytest

from service import addresses


@pytest.mark.parametrize(
    ("host", "plain", "network"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("::FFFF:c000:207", "192.0.2.7", "192.0.2.7"),
        ("2001:db8:0:0::7", "2001:db8::7", "2001:db8::/64"),
        ("2001:DB8::ffff:ffff:ffff:ffff", "2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
        ("2001:db8:0:1::7", "2001:db8:0:1::7", "2001:db8:0:1::/64"),
        ("fe80::7%eth0", "fe80::7", "fe80::/64"),
        ("::1", "::1", "::1"),
        ("", "", ""),
        ("unknown", "unknown", "unknown"),
        ("a:b", "a:b", "a:b"),
        ("x" * 1000, "x" * 64, "x" * 64),
    ],
)
def test_a_client_has_one_spelling(host: str, plain: str, network: str) -> None:
    assert (addresses.plain(host), addresses.network(host)) == (plain, network)
