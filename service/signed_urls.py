"""Signed URLs, which allow GET and HEAD of one resource without an API key until they expire."""

import base64
import hashlib
import hmac
import re
from urllib.parse import parse_qsl, quote, urlencode

SIGNATURE_PARAMETERS = frozenset({"expires", "signature"})
"""Query parameters that signing adds."""
_PURPOSE = "afterimage-link-1"  # so that other signatures by the same secret are not valid links
_NUMBER = re.compile(r"[0-9]{1,18}")  # a request with an API key may send any `expires`


def sign(secret: bytes, path: str, query: str, expires: int) -> str:
    """Return the URL, without scheme and host, that allows GET and HEAD of `path` with `query`.

    `path` is decoded, as in an ASGI scope; `query` is encoded, without `?`, and its parameters
    `expires` and `signature` are replaced. `expires` is in seconds since the epoch. Raises
    `ValueError` for an empty secret.
    """
    signed_query = _canonical(query)
    signature = _signature(secret, path, signed_query, expires)
    added = urlencode({"expires": expires, "signature": signature})
    return f"{quote(path)}?{signed_query}&{added}" if signed_query else f"{quote(path)}?{added}"


def valid(secret: bytes, path: str, query: str, now: float) -> bool:
    """Whether a GET or HEAD request has a valid signature that has not expired.

    The order of the parameters does not matter, except among parameters of the same name. Raises
    `ValueError` for an empty secret.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = sorted(pair for pair in pairs if pair[0] in SIGNATURE_PARAMETERS)
    if [name for name, _ in parameters] != ["expires", "signature"]:
        return False
    (_, expires), (_, signature) = parameters
    expected = _signature(secret, path, _canonical(query), expires)
    genuine = hmac.compare_digest(expected.encode(), signature.encode())
    return genuine and now < int(expires)  # a number, because `sign` signs nothing else


def seconds_left(query: str, now: float) -> int | None:
    """Seconds until the signed link in a query expires; None if `expires` is missing or no number.

    Does not check the signature: a request with an API key may contain any `expires`.
    """
    expires = dict(parse_qsl(query)).get("expires", "")
    return max(int(expires) - int(now), 0) if _NUMBER.fullmatch(expires) else None


def _canonical(query: str) -> str:
    """The part of a query that is signed, sorted by name; equal names keep their order."""
    pairs = parse_qsl(query, keep_blank_values=True)
    signed = (pair for pair in pairs if pair[0] not in SIGNATURE_PARAMETERS)
    return urlencode(sorted(signed, key=lambda pair: pair[0]))


def _signature(secret: bytes, path: str, canonical: str, expires: int | str) -> str:
    """HMAC-SHA256 of purpose, method, path, query and expiry, in base64url without padding.

    The fields are joined by newlines; percent-encoding ensures that no field contains one.
    """
    if not secret:
        raise ValueError("the secret is empty; links cannot be signed without a secret")
    lines = (_PURPOSE, "GET", quote(path), canonical, quote(str(expires)))
    digest = hmac.digest(secret, "\n".join(lines).encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
