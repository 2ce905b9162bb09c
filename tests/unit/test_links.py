"""Signed, expiring URLs."""

from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.signed_urls import sign, valid

SECRET = b"0123456789abcdef0123456789abcdef"
PATH, QUERY, UNTIL = "/v1/decodes/3f2b/image", "realism=0.5&min_tier=", 2_000_000_000

NAMES = st.text(max_size=8).filter(lambda name: name not in {"expires", "signature"})
PAIRS = st.lists(st.tuples(NAMES, st.text(max_size=8)), max_size=5)
PATHS = st.text(max_size=30).map(lambda text: f"/{text}")


def parts(url: str) -> tuple[str, str]:
    path, _, query = url.partition("?")
    return path, query


def signed_parameters() -> list[tuple[str, str]]:
    return parse_qsl(parts(sign(SECRET, PATH, QUERY, UNTIL))[1], keep_blank_values=True)


def is_valid(pairs: list[tuple[str, str]], path: str = PATH, now: float = 0) -> bool:
    return valid(SECRET, path, urlencode(pairs), now)


def test_a_link_is_valid_until_it_expires() -> None:
    assert is_valid(signed_parameters(), now=UNTIL - 0.001)
    assert not is_valid(signed_parameters(), now=UNTIL)


def test_a_link_keeps_path_and_query() -> None:
    path, query = parts(sign(SECRET, PATH, QUERY, UNTIL))
    assert path == PATH
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    assert parameters.keys() == {"realism", "min_tier", "expires", "signature"}
    assert [parameters[name] for name in ("realism", "min_tier", "expires")] == [
        "0.5",
        "",
        str(UNTIL),
    ]
    assert len(parameters["signature"]) == 43 and "=" not in parameters["signature"]


def test_any_change_invalidates_a_link() -> None:
    pairs = signed_parameters()
    assert not is_valid(pairs, path="/v1/decodes/3f2b")
    assert not is_valid(pairs, path=PATH + "/")
    assert not is_valid(pairs, path=PATH.upper())
    for i, (name, value) in enumerate(pairs):
        for changed in ((name, value + "0"), (name, value[:-1] + "!"), (name.upper(), value)):
            assert not is_valid([*pairs[:i], changed, *pairs[i + 1 :]]), changed
        assert not is_valid(pairs[:i] + pairs[i + 1 :]), f"without {name}"
        assert not is_valid([*pairs, (name, value)]), f"{name} twice"
    assert not is_valid([*pairs, ("min_tier", "perceptual")])
    assert not is_valid([*pairs, ("more", "")])


@pytest.mark.parametrize("expires", ["", "-1", "9" * 5000, "1e99", "nan", "٣", "2000000000 "])
def test_another_expiry_needs_another_signature(expires: str) -> None:
    assert not is_valid([(n, expires if n == "expires" else v) for n, v in signed_parameters()])


def test_another_secret_gives_another_signature() -> None:
    path, query = parts(sign(SECRET, PATH, QUERY, UNTIL))
    assert not valid(SECRET[::-1], path, query, 0)
    for call in (lambda: sign(b"", PATH, QUERY, UNTIL), lambda: valid(b"", path, query, 0)):
        with pytest.raises(ValueError, match="without a secret"):
            call()


def test_parameters_may_be_reordered_except_repeated_ones() -> None:
    _, query = parts(sign(SECRET, PATH, "a=1&b=2&a=3", UNTIL))
    one, two, three, *signature = parse_qsl(query)
    assert is_valid([*signature, three, one, two])
    assert not is_valid([two, one, three, *signature])  # the last `a` may be the one that counts


def test_signing_a_signed_url_replaces_its_signature() -> None:
    path, query = parts(sign(SECRET, PATH, QUERY, 1))
    assert sign(SECRET, path, query, UNTIL) == sign(SECRET, PATH, QUERY, UNTIL)


@given(PATHS, PAIRS, st.integers(0, 10**12))
@example("/a\nb?c#d%2F", [("\n", "&="), ("", "")], 0)
def test_every_signed_url_is_valid(path: str, pairs: list[tuple[str, str]], until: int) -> None:
    url = sign(SECRET, path, urlencode(pairs), until)
    assert url.isascii() and url.isprintable()
    query = urlsplit(f"http://host{url}").query
    assert url == f"{quote(path)}?{query}"
    assert valid(SECRET, path, query, until - 1)


@given(PATHS, PAIRS, PATHS, PAIRS)
@example("/a", [("b", "c")], "/a\nb=c", [])
def test_a_signature_is_valid_for_no_other_url(
    path: str, pairs: list[tuple[str, str]], other: str, others: list[tuple[str, str]]
) -> None:
    _, query = parts(sign(SECRET, path, urlencode(pairs), UNTIL))
    signature = [pair for pair in parse_qsl(query) if pair[0] in {"expires", "signature"}]
    same = path == other and sorted(pairs, key=first) == sorted(others, key=first)
    assert is_valid([*others, *signature], other) == same


def first(pair: tuple[str, str]) -> str:
    return pair[0]


@given(st.text(), st.text() | st.text("expirsgnatu=&%0;+é"))
def test_the_check_never_fails_on_arbitrary_urls(path: str, query: str) -> None:
    assert not valid(SECRET, path, query, 0)
