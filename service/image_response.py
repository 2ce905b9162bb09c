"""A picture as an HTTP answer: validators, ranges, and what it says about itself."""

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
from worker.queue.records import DecodeRequest

DRAFT_CACHE = "max-age=0, stale-while-revalidate=60"
FINAL_S = 31_536_000
"""How long a finished picture may be kept: its URL means no other."""
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


def picture(
    request: Request,
    data: bytes,
    format: OutputFormat,
    decode: DecodeRequest | None,
    headers: Mapping[str, str] | None = None,
    status: int = 200,
) -> Response:
    """200 with the picture file, 304 where the client has it, 206 for a part of it.

    `decode` is what was drawn; None: the instant picture.
    Conditions belong to GET and HEAD, ranges to GET. Raises `RangeNotSatisfiable`.
    """
    digest = hashlib.sha256(data).hexdigest()
    own = {
        "ETag": f'"{digest}"',
        "Cache-Control": _draft_cache(request) if decode is None else _final_cache(request),
        "Vary": "Accept",
        "X-Afterimage-Tier": decode.tier if decode else "instant",
        **(drawn(decode) if decode else {}),
        **(headers or {}),
    }
    if request.method in {"GET", "HEAD"}:
        if _known(request, own["ETag"]):
            return Response(status_code=304, headers=own)
        own["Accept-Ranges"] = "bytes"
        asked = request.headers.get("range") if request.method == "GET" else None
        if asked and request.headers.get("if-range", own["ETag"]) == own["ETag"]:
            part = _range(asked, len(data))
            if part is not None:
                own["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
                data, status = data[part], 206
    own["Content-Digest"] = f"sha-256=:{_base64(data)}:"
    return Response(data, status, own, MEDIA_TYPES[format])


def drawn(decode: DecodeRequest) -> dict[str, str]:
    """That it is synthesised, and how: a dictionary of RFC 9651, the seed as a string."""
    facts = asdict(decode.settings) | {
        "seed": str(decode.seed), "codec": decode.codec, "decoder": decode.decoder
    }  # fmt: skip
    items = (f"{k}={json.dumps(v)}" for k, v in facts.items())
    return {"X-Afterimage-Note": "synthesised detail", "X-Afterimage-Drawn": ", ".join(items)}


def _draft_cache(request: Request) -> str:
    return DRAFT_CACHE if request.app.state.keys is None else f"private, {DRAFT_CACHE}"


def _final_cache(request: Request) -> str:
    """Shared caches do not hold what needs a key, nor anyone a picture for longer than its link."""
    if request.app.state.keys is None:
        return f"max-age={FINAL_S}, immutable"
    left = signed_urls.left_s(request.scope["query_string"].decode("latin-1"), time.time())
    if left is None:
        return f"private, max-age={FINAL_S}, immutable"
    return f"private, max-age={min(left, FINAL_S)}"


def _known(request: Request, etag: str) -> bool:
    named = ",".join(request.headers.getlist("if-none-match"))
    tags = {tag.strip().removeprefix("W/") for tag in named.split(",")}
    return bool(tags & {etag, "*"})


def _range(asked: str, size: int) -> slice | None:
    """One range of bytes; None for several or for what is none, which are answered whole."""
    found = _RANGE.fullmatch(asked.strip())
    if not found or found.groups() == (None, None):
        return None
    first, last = (None if n is None else int(n) for n in found.groups())
    if first is None:  # the last so many
        first, last = max(size - (last or 0), 0), size - 1
    last = size - 1 if last is None else min(last, size - 1)
    if found[1] and found[2] and int(found[2]) < int(found[1]):
        return None
    if first > last:
        raise RangeNotSatisfiable(f"{asked} of {size} bytes", {"Content-Range": f"bytes */{size}"})
    return slice(first, last + 1)


def _base64(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
