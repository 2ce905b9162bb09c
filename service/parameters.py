"""Checks query parameters: refuses unknown and repeated ones; on links, ignores analytics' ones."""

import difflib
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any, get_args, get_origin
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.params import Query

from service.signed_urls import SIGNATURE_PARAMETERS

ANALYTICS = frozenset({
    "__s", "_branch_match_id", "_ga", "_gl", "_hsenc", "_hsmi", "_kx", "_openstat", "dclid", "epik",
    "fbclid", "gad_source", "gbraid", "gclid", "gclsrc", "hsctatracking", "igsh", "igshid",
    "irclickid", "li_fat_id", "mc_cid", "mc_eid", "mibextid", "mkt_tok", "msclkid", "oly_anon_id",
    "oly_enc_id", "rb_clickid", "rdt_cid", "ref", "ref_src", "ref_url", "s_cid", "s_kwcid",
    "sc_cid", "si", "spm", "srsltid", "trk", "ttclid", "twclid", "vero_conv", "vero_id", "wbraid",
    "wickedid", "yclid", "ysclid",
})  # fmt: skip
"""Parameters that messengers, newsletters and advertisements add to links for analytics."""
ANALYTICS_PREFIXES = ("utm_", "hsa_", "mtm_", "pk_", "matomo_", "fb_", "ml_", "__hs")
MAX_PARAMETERS = 64
"""Parameters of one URL: each costs some microseconds before it is known to be invalid."""
MAX_FAULTS = 8
"""Faults that one response lists: each costs a comparison with all known names."""
MAX_QUOTED = 64
"""Longest part of a name or value that an error repeats."""


def only_known(on_link: bool = False) -> Callable[..., Awaitable[None]]:
    """Return a dependency that refuses query parameters that the route does not read.

    With `on_link`, for routes that users open as links, parameters of analytics are ignored and
    those of signatures accepted. The dependency raises `RequestValidationError`.
    """

    async def check(request: Request) -> None:
        query = request.scope["query_string"]
        if not query:
            return
        if query.count(b"&") >= MAX_PARAMETERS:
            message = f"the URL has more than {MAX_PARAMETERS} parameters, which is the limit"
            raise RequestValidationError([fault("query", "", message)])
        faults = list(itertools.islice(_faults(request, on_link), MAX_FAULTS))
        if faults:
            raise RequestValidationError(faults)

    return check


def misplaced(request: Request, fields: Mapping[str, str]) -> RequestValidationError:
    """Return the error for fields of a multipart form: parameters must be in the URL."""
    known = _fields(request)
    faults = []
    for name, value in list(fields.items())[:MAX_FAULTS]:
        hint = _unknown(name, known)
        if name in known:
            query = urlencode({name: value[:MAX_QUOTED]})
            hint = f"fields of a form are not read; send it in the URL: ?{query}"
        faults.append(fault("form", name, hint))
    return RequestValidationError(faults)


def fault(place: str, name: str, message: str) -> dict[str, Any]:
    """An error of a parameter, in the form that `RequestValidationError` lists."""
    return {"type": "value_error", "loc": (place, name[:MAX_QUOTED]), "msg": message}


def link_query(request: Request) -> str:
    """Return the query of a link as it was when the link was signed.

    Parameters of analytics are left out, and numbers are written as the service writes them:
    `realism=1` becomes `realism=1.0`.
    """
    known = _fields(request)
    query = request.scope["query_string"].decode("latin-1")
    pairs = []
    for name, text in parse_qsl(query, keep_blank_values=True):
        if is_analytics(name):
            continue
        value, errors = known[name].validate(text) if name in known else (text, [])
        pairs.append((name, text if errors else str(value)))
    return urlencode(pairs)


def is_analytics(name: str) -> bool:
    """True for a parameter that analytics add to links."""
    name = name.lower()
    return name in ANALYTICS or name.startswith(ANALYTICS_PREFIXES)


def _faults(request: Request, on_link: bool) -> Iterator[dict[str, Any]]:
    known = _fields(request)
    for name in request.query_params:
        if on_link and is_analytics(name):
            continue
        count = len(request.query_params.getlist(name))
        if name not in known and not (on_link and name in SIGNATURE_PARAMETERS):
            yield fault("query", name, _unknown(name, known))
        elif count > 1 and not _is_list(known.get(name)):
            yield fault("query", name, f"the parameter is sent {count} times; send it once")


def _fields(request: Request) -> dict[str, Any]:
    """Name -> FastAPI's field of each query parameter that the matched route reads."""
    parameters = get_flat_params(request.scope["route"].dependant)
    return {field.alias: field for field in parameters if isinstance(field.field_info, Query)}


def _is_list(field: Any) -> bool:
    """True for a parameter that may be repeated."""
    annotation = field.field_info.annotation if field else None
    return list in {get_origin(a) for a in (annotation, *get_args(annotation))}


def _unknown(name: str, known: Collection[str]) -> str:
    if not known:
        return "there is no such parameter; this route reads none"
    nearest = difflib.get_close_matches(name[:MAX_QUOTED].lower(), known, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else "this route reads " + ", ".join(known)
    return f"there is no such parameter; {hint}"
