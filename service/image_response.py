"""Picture responses: ETags, conditional requests, byte ranges, caching and provenance headers."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict

from fastapi import Request, Response

from models.image import MEDIA_TYPES, OutputFormat
from service import signed_urls
from service.problems import RangeNotSatisfiable
from service.services import Services
from worker.queue.records import DecodeRequest

DRAFT_CACHE = "max-age=0, stale-while-revalidate=60"
FINAL_S = 31_536_000
"""How long clients may cache a finished picture: one year, because its content never changes."""
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


def picture(
    services: Services,
    request: Request,
    data: bytes,
    format: OutputFormat,
    decode: DecodeRequest | None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return 200 with a picture file, 304 if the client has it, or 206 with a part of it.

    `decode` describes a finished picture; None for an instant picture. Only GET and HEAD
    may be conditional, only GET may ask for a range. Raises `RangeNotSatisfiable`.
    """
    digest = hashlib.sha256(data).digest()
    etag = f'"{digest.hex()}"'
    fields = {
        "ETag": etag,
        "Cache-Control": _cache_control(services, request, final=decode is not None),
        "Vary": "Accept",
        "X-Afterimage-Tier": decode.tier if decode else "instant",
        **(provenance_headers(decode) if decode else {}),
        **(headers or {}),
    }
    status = 200
    if request.method in {"GET", "HEAD"}:
        if _client_has(request, etag):
            return Response(status_code=304, headers=fields)
        fields["Accept-Ranges"] = "bytes"
        part = _requested_part(request, etag, len(data))
        if part is not None:
            fields["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
            data, status = data[part], 206
            digest = hashlib.sha256(data).digest()
    fields["Content-Digest"] = f"sha-256=:{base64.b64encode(digest).decode()}:"
    return Response(data, status, fields, MEDIA_TYPES[format])


def provenance_headers(decode: DecodeRequest) -> dict[str, str]:
    """Headers that mark a picture as synthesised and list its settings.

    The settings are an RFC 9651 dictionary; the seed is a string, since it may exceed the range of
    that format's integers.
    """
    settings = asdict(decode.settings) | {
        "seed": str(decode.seed), "codec": decode.codec, "decoder": decode.decoder
    }  # fmt: skip
    items = (f"{name}={json.dumps(value)}" for name, value in settings.items())
    return {"X-Afterimage-Note": "synthesised detail", "X-Afterimage-Drawn": ", ".join(items)}


def _cache_control(services: Services, request: Request, final: bool) -> str:
    """The `Cache-Control` header.

    Shared caches must not store pictures that need a key. A picture that was requested by a signed
    link may be cached until the link expires.
    """
    if services.keys is None:
        return f"max-age={FINAL_S}, immutable" if final else DRAFT_CACHE
    if not final:
        return f"private, {DRAFT_CACHE}"
    query = request.scope["query_string"].decode("latin-1")
    seconds = signed_urls.seconds_left(query, time.time())
    if seconds is None:
        return f"private, max-age={FINAL_S}, immutable"
    return f"private, max-age={min(seconds, FINAL_S)}"


def _client_has(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` names `etag`."""
    header = ",".join(request.headers.getlist("if-none-match"))
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return bool(tags & {etag, "*"})


def _requested_part(request: Request, etag: str, size: int) -> slice | None:
    """The bytes that a GET request asks for; None for the whole picture."""
    header = request.headers.get("range")
    if request.method != "GET" or not header or request.headers.get("if-range", etag) != etag:
        return None
    return _parse_range(header, size)


def _parse_range(header: str, size: int) -> slice | None:
    """Parse a `Range` header. Returns None, so that it is ignored, if it is invalid or has several
    ranges.

    Raises `RangeNotSatisfiable`.
    """
    match = _RANGE.fullmatch(header.strip())
    if not match or match.groups() == (None, None):
        return None
    first, last = (None if n is None else int(n) for n in match.groups())
    if first is None:  # the last so many bytes
        first, last = max(size - (last or 0), 0), size - 1
    last = size - 1 if last is None else min(last, size - 1)
    if match[1] and match[2] and int(match[2]) < int(match[1]):
        return None
    if first > last:
        message = f"the range {header} starts after the end of the file, which has {size} bytes"
        raise RangeNotSatisfiable(message, {"Content-Range": f"bytes */{size}"})
    return slice(first, last + 1)
