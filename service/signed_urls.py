"""Signed URLs: who holds one may GET exactly what it names until it expires, without a key."""

import base64
import hashlib
import hmac
import re
from urllib.parse import parse_qsl, quote, urlencode

_PURPOSE = "afterimage-link-1"  # signatures of other things with the same secret are no links
_OWN = {"expires", "signature"}
_NUMBER = re.compile(r"[0-9]{1,18}")  # with keys alone, a query may say anything


def sign(secret: bytes, path: str, query: str, expires: int) -> str:
    """The URL, without scheme and host, that grants GET and HEAD of `path` and `query`.

    `path` is decoded, as in ASGI's scope, `query` as in a URL, without `?`; its parameters
    `expires` and `signature` are replaced. `expires`: seconds since the epoch. Raises `ValueError`
    for an empty secret.
    """
    other = _canonical(query)
    added = urlencode({"expires": expires, "signature": _signature(secret, path, other, expires)})
    return f"{quote(path)}?{other}&{added}" if other else f"{quote(path)}?{added}"


def valid(secret: bytes, path: str, query: str, now: float) -> bool:
    """Whether the request, a GET or HEAD, is what `sign` granted, and in time.

    Parameters may come in another order, except those of one name: the last of them may count.
    Raises `ValueError` for an empty secret.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    own = sorted(pair for pair in pairs if pair[0] in _OWN)
    if [name for name, _ in own] != ["expires", "signature"]:
        return False
    (_, expires), (_, given) = own
    expected = _signature(secret, path, _canonical(query), expires)
    genuine = hmac.compare_digest(expected.encode(), given.encode())
    return genuine and now < int(expires)  # a number, as we signed it


def left_s(query: str, now: float) -> int | None:
    """Seconds that the link of a valid request is valid still; None where it comes by none."""
    expires = dict(parse_qsl(query)).get("expires", "")
    return max(int(expires) - int(now), 0) if _NUMBER.fullmatch(expires) else None


def _canonical(query: str) -> str:
    """The other parameters, by name; those of one name stay in order."""
    pairs = parse_qsl(query, keep_blank_values=True)
    return urlencode(sorted((p for p in pairs if p[0] not in _OWN), key=lambda pair: pair[0]))


def _signature(secret: bytes, path: str, canonical: str, expires: int | str) -> str:
    """HMAC-SHA256 in base64url without padding; no line can hold a newline, so none can move."""
    if not secret:
        raise ValueError("links cannot be signed without a secret")
    lines = (_PURPOSE, "GET", quote(path), canonical, quote(str(expires)))
    made = hmac.digest(secret, "\n".join(lines).encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(made).rstrip(b"=").decode()
