"""Which names the service answers to, and which pages may change something."""

import asyncio
from collections.abc import Collection

import httpx
import pytest
from starlette.responses import PlainTextResponse

from service import origins
from service.origins import OriginMiddleware


def send(
    method: str = "POST",
    path: str = "/v1/decodes",
    hosts: Collection[str] = ("box",),
    allowed: Collection[str] | None = (),
    **headers: str,
) -> httpx.Response:
    """Send a request to the middleware; write _ for - in names of headers."""
    app = OriginMiddleware(PlainTextResponse("ok"), hosts, allowed)
    names = [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in headers.items()
    ]

    async def once() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            return await client.request(method, path, headers=names)

    return asyncio.run(once())


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "app.localhost:80", "localhost.", "127.0.0.1", "127.0.0.9:1",
     "10.1.2.3:8000", "[::1]", "[2001:db8::1]:8000", "[fe80::1%25eth0]:80", "box", "Box:8000", ""],
)  # fmt: skip
def test_addresses_and_names_of_the_machine_are_answered(host: str) -> None:
    assert send(host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8000", "127.0.0.1.attacker.example", "localhost.evil",
     "notlocalhost", "127.0.0.1:80:80", "[::1].evil", "0x7f.1", "evil\xe4", "a" * 60_000],
)  # fmt: skip
def test_other_names_are_refused_with_the_setting_that_allows_them(host: str) -> None:
    response = send("GET", host=host)
    assert response.status_code == 421
    assert response.json()["type"] == "urn:afterimage:problem:misdirected-request"
    assert "AFTERIMAGE_HOSTS" in response.json()["detail"] and len(response.content) < 3000


def test_hosts_may_be_listed_with_their_subdomains_or_all_be_allowed() -> None:
    hosts = ("decode.example", "*.cluster.local")
    for host, status in (
        ("decode.example:443", 200), ("www.decode.example", 421), ("cluster.local", 421),
        ("api.cluster.local", 200), ("api.afterimage.svc.CLUSTER.local", 200), ("localhost", 200),
    ):  # fmt: skip
        assert send(host=host, hosts=hosts).status_code == status
    assert send(host="attacker.example", hosts=("*",)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics"])
def test_probes_are_answered_under_any_name(path: str) -> None:
    assert send("GET", path, host="kubelet.example").status_code == 200
    assert send("GET", f"{path}/x", host="kubelet.example").status_code == 421


def test_names_default_to_this_machine_or_with_keys_to_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert origins.names((), keyed=False) == ("box",)
    assert origins.names((), keyed=True) == ("*",)
    assert origins.names(("a.example",), keyed=True) == ("a.example",)


EVIL = "https://evil.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # not a browser
        ({"sec_fetch_site": "cross-site", "origin": EVIL}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site", "origin": "http://localhost:3000"}, 403),
        ({"sec_fetch_site": "same-origin", "origin": "http://behind.a.proxy"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"origin": EVIL}, 403),  # a browser that does not deem this address secure
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "http://localhost:8000"}, 403),
        ({"origin": "http://LOCALHOST:8000", "host": "localhost:8000"}, 200),
        ({"origin": EVIL, "content_type": "text/plain"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_sites_may_not_change_anything(
    method: str, headers: dict[str, str], status: int
) -> None:
    response = send(method, **headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["type"] == "urn:afterimage:problem:cross-site-request"
        assert "AFTERIMAGE_CORS_ORIGINS" in response.json()["detail"]


def test_origins_that_cors_allows_and_services_with_keys_are_not_checked() -> None:
    assert send(origin=EVIL, sec_fetch_site="cross-site", allowed=(EVIL,)).status_code == 200
    assert send(origin=EVIL, sec_fetch_site="cross-site", allowed=("*",)).status_code == 200
    assert send(origin=EVIL, allowed=("https://other.example",)).status_code == 403
    assert send(origin=EVIL, sec_fetch_site="cross-site", allowed=None).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_links_from_other_sites_are_followed(method: str) -> None:
    assert send(method, sec_fetch_site="cross-site", origin=EVIL).status_code == 200
