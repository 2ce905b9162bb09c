"""The guard of webhook URLs: which hosts, ports and addresses are allowed."""

import threading
from collections.abc import Callable

import pytest

from models.errors import ParameterError
from worker.webhooks import url_guard

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:220:1:248:1893:25c8:1946"

PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.9.1",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "224.0.1.1",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::ffff:10.0.0.1", "::ffff:93.184.216.34", "::10.0.0.1", "64:ff9b::a00:1",
    "64:ff9b::5db8:d822", "64:ff9b:1::1", "2002:a00:1::1", "2002:5db8:d822::1", "2001::1",
    "2001:db8::1", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
    "ff0e::1", "100::1", "5f00::1", "4000::1", "2606:4700::1111%eth0", "not an address", "",
]  # fmt: skip


def resolver_of(*addresses: str) -> Callable[[str], list[str]]:
    """A resolver that returns these addresses for any host."""
    return lambda _host: list(addresses)


def assert_refused(
    url: str, text: str, *addresses: str, allow: frozenset[str] = frozenset()
) -> None:
    with pytest.raises(ParameterError, match=text):
        url_guard.check(url, allow, resolver_of(*(addresses or (PUBLIC,))))


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_other_than_global_unicast_are_not_public(address: str) -> None:
    assert not url_guard.is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, PUBLIC_6, "8.8.8.8", "1.1.1.1", "2a00:1450::1"])
def test_global_unicast_is_public(address: str) -> None:
    assert url_guard.is_public(address)


def test_a_target_has_the_parts_of_the_url_and_the_resolved_addresses() -> None:
    target = url_guard.check(
        "https://Hooks.Example.com:8443/a%20b?q=ü#end",
        resolver=resolver_of(PUBLIC, PUBLIC_6, PUBLIC),
    )
    assert (target.scheme, target.host, target.port) == ("https", "hooks.example.com", 8443)
    assert target.path == b"/a%20b?q=%C3%BC"
    assert target.addresses == (PUBLIC, PUBLIC_6)
    assert target.authority == "hooks.example.com:8443"


def test_the_host_header_has_a_port_unless_it_is_the_default_port() -> None:
    assert (
        url_guard.check("https://a.example", resolver=resolver_of(PUBLIC)).authority == "a.example"
    )
    ipv6 = url_guard.check(f"https://[{PUBLIC_6}]:8443/", resolver=resolver_of(PUBLIC_6))
    assert (ipv6.host, ipv6.authority) == (PUBLIC_6, f"[{PUBLIC_6}]:8443")


def test_international_host_names_are_encoded_as_ascii() -> None:
    assert url_guard.check("https://bücher.example/", resolver=resolver_of(PUBLIC)).host == (
        "xn--bcher-kva.example"
    )


@pytest.mark.parametrize(
    "host",
    ["127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "0", "10.1", "127.0.0.1", "[::1]",
     "[::ffff:10.0.0.1]", "[::ffff:7f00:1]", "[::]", "[fe80::1%25eth0]", "[64:ff9b::7f00:1]",
     "169.254.169.254", "localhost", "localhost.", "ip6-localhost"],
)  # fmt: skip
def test_every_spelling_of_a_private_address_is_refused(host: str) -> None:
    with pytest.raises(ParameterError, match="webhook"):
        url_guard.check(f"https://{host}/")


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "134744072", "1.2.3"])
def test_numbers_that_resolvers_parse_as_addresses_are_not_hosts(host: str) -> None:
    assert_refused(f"https://{host}/", "neither a name nor an IP address")


@pytest.mark.parametrize("private", ["10.0.0.1", "::1", "169.254.169.254"])
def test_one_private_address_among_public_ones_is_refused(private: str) -> None:
    assert_refused("https://a.example/", "public addresses only", PUBLIC, private)
    assert_refused("https://a.example/", "public addresses only", private, PUBLIC)


def test_the_error_does_not_reveal_the_addresses_of_a_name() -> None:
    messages = []
    for addresses in (["10.0.0.1"], []):
        with pytest.raises(ParameterError) as e:
            url_guard.check("https://db.internal/", resolver=resolver_of(*addresses))
        messages.append(str(e.value))
    assert messages[0] == messages[1]
    assert "10.0.0.1" not in messages[0]


@pytest.mark.parametrize("error", [OSError("none"), UnicodeError("label too long")])
def test_a_name_that_does_not_resolve_is_refused(error: Exception) -> None:
    def fail(_host: str) -> list[str]:
        raise error

    with pytest.raises(ParameterError, match="does not resolve"):
        url_guard.check("https://nowhere.example/", resolver=fail)


def test_names_in_the_top_level_domain_invalid_are_refused() -> None:
    with pytest.raises(ParameterError, match="does not resolve"):
        url_guard.check("https://nowhere.invalid/")


def test_resolving_a_host_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_: object, **__: object) -> list[str]:
        released.wait(60)
        return []

    monkeypatch.setattr(url_guard, "RESOLVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("socket.getaddrinfo", hang)
    with pytest.raises(TimeoutError):
        url_guard.resolve("slow.example")
    released.set()


def test_schemes_other_than_https_are_refused() -> None:
    for url in ("http://a.example/", "ftp://a.example/", "file:///etc/passwd", "//a.example/", ""):
        assert_refused(url, "webhook")


def test_users_and_passwords_are_refused() -> None:
    for user in ("user", "user:password", ":password", "good.example\\"):
        assert_refused(f"https://{user}@a.example/", "user or password")


def test_low_ports_other_than_443_are_refused() -> None:
    for port in (22, 25, 80, 1023):
        assert_refused(f"https://a.example:{port}/", "use 443")
    for port in (443, 1024, 65535):
        url_guard.check(f"https://a.example:{port}/", resolver=resolver_of(PUBLIC))
    for port in (0, 65536, 99999):
        assert_refused(f"https://a.example:{port}/", "not between 1 and 65535")


def test_long_urls_are_refused() -> None:
    url = "https://a.example/".ljust(url_guard.MAX_URL, "x")
    url_guard.check(url, resolver=resolver_of(PUBLIC))
    assert_refused(url + "x", "2049 characters")


@pytest.mark.parametrize(
    "url",
    ["https://", "https:///path", "https://a b/", "https://a\r\nX: y/", "https://a%00.example/",
     "https://a..example/", "https://-a.example/", "https://a.example\\.b.example/",
     "https://①②⑦.0.0.1/", "https://[::1/", "https://a.example:port/"],
)  # fmt: skip
def test_invalid_urls_are_refused(url: str) -> None:
    assert_refused(url, "webhook")


def test_an_allowed_host_may_be_private_and_use_http_and_any_port() -> None:
    allow = frozenset({"hooks.internal", "10.0.0.1:8080", "[::1]:80"})
    for url in (
        "http://hooks.internal/", "https://hooks.internal:22/", "http://10.0.0.1:8080/",
        "http://[::1]/",
    ):  # fmt: skip
        assert url_guard.check(url, allow, resolver_of("10.0.0.1")).addresses == ("10.0.0.1",)


def test_hosts_that_resemble_an_allowed_host_are_refused() -> None:
    allow = frozenset({"hooks.internal", "10.0.0.1:8080"})
    for url in (
        "https://x.hooks.internal/", "https://hooks.internal.example/", "https://10.0.0.1:8081/",
    ):  # fmt: skip
        assert_refused(url, "public addresses only", "10.0.0.1", allow=allow)
    assert_refused("http://10.0.0.1:8081/", "https", "10.0.0.1", allow=allow)


def test_an_allowed_name_does_not_allow_its_address() -> None:
    assert_refused("https://127.0.0.1/", "public", "127.0.0.1", allow=frozenset({"localhost"}))
