"""Errors to HTTP: RFC 9457 `application/problem+json`, one table for all of them."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.config import JsonDict
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from models import errors
from service import metrics
from worker.queue.store import RedisError

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
"""When to come back after a store was away."""


class RequestError(errors.AfterimageError):
    """What a request gets wrong about HTTP, or about the service's state.

    `headers` go with the answer.
    """

    kind = "request-error"

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthorized(RequestError):
    """No API key or signature, or one that is not valid."""

    kind = "unauthorized"


class Forbidden(RequestError):
    """The API key lacks the scope."""

    kind = "forbidden"


class JobNotFound(RequestError):
    """There is no decode with this id."""

    kind = "job-not-found"


class ModelNotFound(RequestError):
    """There are no such weights, or there is no card of them."""

    kind = "model-not-found"


class NotAcceptable(RequestError):
    """None of the formats that `Accept` names can be made."""

    kind = "not-acceptable"


class Conflict(RequestError):
    """The decode has ended, or has not: it cannot be done to it now."""

    kind = "conflict"


class PictureGone(RequestError):
    """The picture is no longer kept; `retry` makes it again."""

    kind = "picture-gone"


class BodyTooLarge(RequestError):
    """More bytes than the limit."""

    kind = "body-too-large"


class IdMismatch(RequestError):
    """The id in the path is not that of the request's content."""

    kind = "id-mismatch"


class KeyReused(RequestError):
    """The `Idempotency-Key` came with another request before."""

    kind = "key-reused"


class RangeNotSatisfiable(RequestError):
    """The range begins behind the picture's end."""

    kind = "range-not-satisfiable"


class RequestTimeout(RequestError):
    """The request's body did not arrive in time."""

    kind = "request-timeout"


class TooManyRequests(RequestError):
    """The caller's quota is used up; `Retry-After` says until when."""

    kind = "too-many-requests"


class QueueFull(RequestError):
    """The queue's memory is nearly used up: no new jobs until old records have expired."""

    kind = "queue-full"


class Busy(RequestError):
    """More requests than can be served soon; `Retry-After` says when to come back."""

    kind = "busy"


class QueueAway(RequestError):
    """The queue cannot be used; instant decodes still work."""

    kind = "queue-away"


class DeadlineExceeded(RequestError):
    """The request's time is over before its answer was there."""

    kind = "deadline-exceeded"


STATUS: dict[type[errors.AfterimageError], int] = {
    errors.MalformedHeader: 400,
    Unauthorized: 401,
    Forbidden: 403,
    JobNotFound: 404,
    ModelNotFound: 404,
    NotAcceptable: 406,
    RequestTimeout: 408,
    Conflict: 409,
    PictureGone: 410,
    errors.PictureTooLarge: 413,
    BodyTooLarge: 413,
    errors.UnsupportedCodec: 415,
    errors.UnsupportedPicture: 415,
    RangeNotSatisfiable: 416,
    errors.BitstreamError: 422,
    errors.PictureError: 422,
    errors.ParameterError: 422,
    errors.Quarantined: 422,
    IdMismatch: 422,
    KeyReused: 422,
    TooManyRequests: 429,
    errors.WeightsError: 500,
    errors.AfterimageError: 500,
    Busy: 503,
    QueueAway: 503,
    QueueFull: 503,
    DeadlineExceeded: 504,
}


def problem(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """A problem document; `kind` is the stable last part of its type."""
    body = {**_document(status, kind, detail), **extra}
    sent = {"Cache-Control": "no-store"}
    if status == 503:
        sent["Retry-After"] = str(RETRY_S)
    return JSONResponse(body, status, {**sent, **(headers or {})}, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""

    @app.exception_handler(errors.AfterimageError)
    async def _own(_request: Request, e: errors.AfterimageError) -> JSONResponse:
        headers = e.headers if isinstance(e, RequestError) else {}
        return problem(status_of(type(e)), type(e).kind, str(e), headers)

    @app.exception_handler(RequestValidationError)
    async def _parameters(_request: Request, e: RequestValidationError) -> JSONResponse:
        found = [
            {"parameter": str(x["loc"][-1]), "in": str(x["loc"][0]), "message": x["msg"]}
            for x in e.errors()
        ]
        text = "; ".join(f"{x['parameter']}: {x['message']}" for x in found)
        return problem(422, "parameter-error", text, errors=found)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, e: HTTPException) -> JSONResponse:
        kinds = {404: "not-found", 405: "method-not-allowed"}
        kind, headers = kinds.get(e.status_code, "http-error"), dict(e.headers or {})
        if e.status_code == 405:
            described = ", ".join(_methods(app, request.url.path))
            headers["Allow"] = described or headers.get("Allow", "")  # of the page: its route's
        return problem(e.status_code, kind, str(e.detail), headers)

    @app.exception_handler(RedisError)
    async def _store(request: Request, _e: RedisError) -> JSONResponse:
        metrics.shed("redis")
        return await _own(request, QueueAway("queue or cache is away; instant decodes still work"))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, _e: Exception) -> JSONResponse:
        ids = {"X-Request-Id": getattr(request.state, "request_id", "")}
        return problem(500, "internal-error", "an unexpected error; it was logged", ids)


def _methods(app: FastAPI, path: str) -> list[str]:
    """What the routes of a path answer to; one route knows of its own methods only."""
    described = app.openapi()["paths"]
    matching = (at for at in described if compile_path(at)[0].match(path))
    return sorted({method.upper() for at in matching for method in described[at]})


def _document(status: int, kind: str, detail: str) -> dict[str, Any]:
    return {
        "type": f"urn:afterimage:problem:{kind}",
        "title": kind.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
    }


EXAMPLE: JsonDict = _document(
    422, "checksum-mismatch", "the bitstream's CRC-32C does not hold: its bytes were changed"
)
OF_KEYS = (Unauthorized, Forbidden, TooManyRequests)
"""What every operation for callers with keys may answer."""
OF_BODIES = (errors.MalformedHeader, RequestTimeout, BodyTooLarge, Busy)
"""What every operation that takes a body may answer."""
OF_BITSTREAMS = (*errors.BitstreamError.__subclasses__(), errors.PictureTooLarge, *OF_BODIES)
"""What every operation that takes a bitstream may answer."""
OF_LINES = (Busy, DeadlineExceeded)
"""What every operation that computes a picture may answer."""


def responses(*kinds: type[errors.AfterimageError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the problems that an operation may answer with, an example of each."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in sorted(set(kinds), key=lambda k: (status_of(k), k.__name__)):
        status, name = status_of(kind), kind.kind
        text = (kind.__doc__ or "").split("\n")[0]
        schema = {"$ref": "#/components/schemas/Problem"}
        empty = {"description": "", "content": {MEDIA_TYPE: {"schema": schema, "examples": {}}}}
        entry = found.setdefault(status, empty)
        entry["description"] = f"{entry['description']} {text}".strip()
        value = _document(status, name, text.rstrip("."))
        entry["content"][MEDIA_TYPE]["examples"][name] = {"summary": text, "value": value}
    return found


def status_of(kind: type[errors.AfterimageError]) -> int:
    """The HTTP status of an error."""
    return next(STATUS[c] for c in kind.__mro__ if c in STATUS)
