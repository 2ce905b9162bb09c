"""Error responses: RFC 9457 `application/problem+json`, with one table of status codes."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.config import JsonDict
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from models import errors
from service import metrics, prefix
from worker.queue import references
from worker.queue.store import RedisError

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
"""`Retry-After` of a 503 that does not set its own."""


class RequestError(errors.AfterimageError):
    """Base of errors of the HTTP API; `headers` are added to the response."""

    kind = "request-error"

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthorized(RequestError):
    """The API key or signed link is missing or not valid."""

    kind = "unauthorized"


class Forbidden(RequestError):
    """The API key lacks the required scope."""

    kind = "forbidden"


class JobNotFound(RequestError):
    """There is no decode with this id."""

    kind = "job-not-found"


class BatchNotFound(RequestError):
    """There is no batch of this caller with this id."""

    kind = "batch-not-found"


class ModelNotFound(RequestError):
    """There is no model card for these weights."""

    kind = "model-not-found"


class WorkerNotFound(RequestError):
    """There is no live worker of this name."""

    kind = "worker-not-found"


class NotAcceptable(RequestError):
    """No format in `Accept` is available."""

    kind = "not-acceptable"


class Conflict(RequestError):
    """The operation is not possible in the current state of the decode or batch."""

    kind = "conflict"


class PictureGone(RequestError):
    """The picture has expired; `retry` makes it again."""

    kind = "picture-gone"


class BodyTooLarge(RequestError):
    """The body is larger than the limit."""

    kind = "body-too-large"


class IdMismatch(RequestError):
    """The id in the path does not match the request's content."""

    kind = "id-mismatch"


class KeyReused(RequestError):
    """The `Idempotency-Key` belongs to another request."""

    kind = "key-reused"


class UnsupportedEncoding(RequestError):
    """The body has a `Content-Encoding`, such as gzip."""

    kind = "unsupported-encoding"


class RangeNotSatisfiable(RequestError):
    """The range starts after the end of the picture."""

    kind = "range-not-satisfiable"


class HeadersTooLarge(RequestError):
    """The request line and headers are larger than the limit."""

    kind = "headers-too-large"


class UnexpectedBody(RequestError):
    """The request has a body besides the parameter `source`."""

    kind = "unexpected-body"


class RequestTimeout(RequestError):
    """The request's body did not arrive in time."""

    kind = "request-timeout"


class TooManyRequests(RequestError):
    """The caller's quota is used up; retry after `Retry-After` seconds."""

    kind = "too-many-requests"


class QueueFull(RequestError):
    """The queue's memory is nearly full: no new jobs are accepted until old records expire."""

    kind = "queue-full"


class Busy(RequestError):
    """The service is overloaded; retry after `Retry-After` seconds."""

    kind = "busy"


class QueueAway(RequestError):
    """Redis is unavailable; instant decodes still work."""

    kind = "queue-away"


class DeadlineExceeded(RequestError):
    """The picture was not ready before the deadline of the request."""

    kind = "deadline-exceeded"


STATUS: dict[type[errors.AfterimageError], int] = {
    errors.MalformedHeader: 400,
    UnexpectedBody: 400,
    Unauthorized: 401,
    Forbidden: 403,
    references.StoreForbidden: 403,
    JobNotFound: 404,
    BatchNotFound: 404,
    ModelNotFound: 404,
    WorkerNotFound: 404,
    references.StoreNotFound: 404,
    references.ObjectNotFound: 404,
    NotAcceptable: 406,
    RequestTimeout: 408,
    Conflict: 409,
    PictureGone: 410,
    errors.PictureTooLarge: 413,
    BodyTooLarge: 413,
    errors.UnsupportedCodec: 415,
    errors.UnsupportedPicture: 415,
    UnsupportedEncoding: 415,
    RangeNotSatisfiable: 416,
    errors.BitstreamError: 422,
    errors.PictureError: 422,
    errors.ParameterError: 422,
    errors.Quarantined: 422,
    IdMismatch: 422,
    KeyReused: 422,
    TooManyRequests: 429,
    HeadersTooLarge: 431,
    errors.WeightsError: 500,
    errors.AfterimageError: 500,
    references.StoreRefused: 502,
    errors.Unavailable: 503,
    Busy: 503,
    QueueAway: 503,
    QueueFull: 503,
    references.StoreAway: 503,
    DeadlineExceeded: 504,
}


def problem(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """Return a problem document; `kind` becomes the last part of its `type`."""
    body = {**_document(status, kind, detail), **extra}
    defaults = {"Cache-Control": "no-store"}
    if status == 503:
        defaults["Retry-After"] = str(RETRY_S)
    return JSONResponse(body, status, {**defaults, **(headers or {})}, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Register handlers that turn every error of `app` into a problem document."""

    @app.exception_handler(errors.AfterimageError)
    async def _afterimage_error(_request: Request, e: errors.AfterimageError) -> JSONResponse:
        headers = e.headers if isinstance(e, RequestError) else {}
        return problem(status_of(type(e)), type(e).kind, str(e), headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid_parameters(_request: Request, e: RequestValidationError) -> JSONResponse:
        invalid = [
            {"parameter": str(x["loc"][-1]), "in": str(x["loc"][0]), "message": x["msg"]}
            for x in e.errors()
        ]
        text = "; ".join(f"{x['parameter']}: {x['message']}" for x in invalid)
        return problem(422, "parameter-error", text, errors=invalid)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, e: HTTPException) -> JSONResponse:
        kinds = {404: "not-found", 405: "method-not-allowed"}
        kind, headers = kinds.get(e.status_code, "http-error"), dict(e.headers or {})
        if e.status_code == 405:
            headers["Allow"] = _allowed(app, request, headers.get("Allow") or "GET")
        return problem(e.status_code, kind, str(e.detail), headers)

    @app.exception_handler(RedisError)
    async def _redis_error(request: Request, _e: RedisError) -> JSONResponse:
        metrics.shed("redis")
        error = QueueAway("Redis is unavailable; instant decodes still work; try again later")
        return await _afterimage_error(request, error)

    @app.exception_handler(Exception)
    async def _unexpected_error(request: Request, _e: Exception) -> JSONResponse:
        ids = {"X-Request-Id": getattr(request.state, "request_id", "")}
        return problem(500, "internal-error", "an unexpected error occurred and was logged", ids)


def _allowed(app: FastAPI, request: Request, undocumented: str) -> str:
    """The header `Allow` of a request's path; HEAD is allowed wherever GET is.

    Starlette's 405 lists the methods of only one of the path's routes. That list, `undocumented`,
    is used for paths that are not in the OpenAPI document, such as the page's.
    """
    path, templates = prefix.routed(request.scope["path"]), app.openapi()["paths"]
    matching = (t for t in templates if compile_path(t)[0].match(path))
    methods = {method.upper() for t in matching for method in templates[t]}
    methods = methods or set(undocumented.replace(" ", "").split(","))
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _document(status: int, kind: str, detail: str) -> dict[str, Any]:
    return {
        "type": f"urn:afterimage:problem:{kind}",
        "title": kind.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
    }


EXAMPLE: JsonDict = _document(
    422, "checksum-mismatch", "the CRC-32C of the bitstream does not match: its bytes were changed"
)
OF_AUTHENTICATION = (Unauthorized, Forbidden, TooManyRequests)
"""Problems of every operation that authenticates its caller."""
OF_BODIES = (errors.MalformedHeader, RequestTimeout, BodyTooLarge, UnsupportedEncoding, Busy)
"""Problems of every operation that takes a body."""
OF_BITSTREAMS = (*errors.BitstreamError.__subclasses__(), errors.PictureTooLarge, *OF_BODIES)
"""Problems of every operation that takes a bitstream."""
OF_STORES = (UnexpectedBody, *references.StoreError)
"""Problems of every operation that takes a `source` or a `target`."""
OF_COMPUTATION = (Busy, DeadlineExceeded, errors.Unavailable)
"""Problems of every operation that computes a picture."""


def responses(*kinds: type[errors.AfterimageError]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI `responses` of these problems, with an example of each."""
    entries: dict[int | str, dict[str, Any]] = {}
    for kind in sorted(set(kinds), key=lambda k: (status_of(k), k.__name__)):
        status, name = status_of(kind), kind.kind
        text = (kind.__doc__ or "").split("\n")[0]
        schema = {"$ref": "#/components/schemas/Problem"}
        empty = {"description": "", "content": {MEDIA_TYPE: {"schema": schema, "examples": {}}}}
        entry = entries.setdefault(status, empty)
        entry["description"] = f"{entry['description']} {text}".strip()
        value = _document(status, name, text.rstrip("."))
        entry["content"][MEDIA_TYPE]["examples"][name] = {"summary": text, "value": value}
    return entries


def status_of(kind: type[errors.AfterimageError]) -> int:
    """Return the HTTP status of an error class."""
    return next(STATUS[c] for c in kind.__mro__ if c in STATUS)
