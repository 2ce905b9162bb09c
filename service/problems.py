"""Errors to HTTP: RFC 9457 `application/problem+json`, one table for all of them."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.config import JsonDict
from starlette.exceptions import HTTPException

from models import errors
from service import metrics
from worker.store import RedisError

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
"""When to come back after a store was away."""


class RequestError(errors.AfterimageError):
    """What a request gets wrong about HTTP, or about the service's state.

    `headers` go with the answer.
    """

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthorized(RequestError):
    """No API key or signature, or one that is not valid."""


class Forbidden(RequestError):
    """The API key lacks the scope."""


class JobNotFound(RequestError):
    """There is no decode with this id."""


class NotAcceptable(RequestError):
    """None of the formats that `Accept` names can be made."""


class Conflict(RequestError):
    """The decode has ended, or has not: it cannot be done to it now."""


class PictureGone(RequestError):
    """The picture is no longer kept; `retry` makes it again."""


class BodyTooLarge(RequestError):
    """More bytes than the limit."""


class IdMismatch(RequestError):
    """The id in the path is not that of the request's content."""


class KeyReused(RequestError):
    """The `Idempotency-Key` came with another request before."""


class RangeNotSatisfiable(RequestError):
    """The range begins behind the picture's end."""


class TooManyRequests(RequestError):
    """The caller's quota is used up; `Retry-After` says until when."""


class Busy(RequestError):
    """More requests than can be served soon; `Retry-After` says when to come back."""


class DeadlineExceeded(RequestError):
    """The request's time is over before its answer was there."""


STATUS: dict[type[errors.AfterimageError], int] = {
    errors.MalformedHeader: 400,
    Unauthorized: 401,
    Forbidden: 403,
    JobNotFound: 404,
    NotAcceptable: 406,
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
    IdMismatch: 422,
    KeyReused: 422,
    TooManyRequests: 429,
    errors.WeightsError: 500,
    errors.AfterimageError: 500,
    Busy: 503,
    DeadlineExceeded: 504,
}


def problem(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """A problem document; `kind` is the stable last part of its type."""
    body = {
        "type": f"urn:afterimage:problem:{kind}",
        "title": kind.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        **extra,
    }
    sent = {"Cache-Control": "no-store"}
    if status == 503:
        sent["Retry-After"] = str(RETRY_S)
    return JSONResponse(body, status, {**sent, **(headers or {})}, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""

    @app.exception_handler(errors.AfterimageError)
    async def _own(_request: Request, e: errors.AfterimageError) -> JSONResponse:
        status = next(STATUS[c] for c in type(e).__mro__ if c in STATUS)
        headers = e.headers if isinstance(e, RequestError) else {}
        return problem(status, _kind(type(e).__name__), str(e), headers)

    @app.exception_handler(RequestValidationError)
    async def _parameters(_request: Request, e: RequestValidationError) -> JSONResponse:
        found = [
            {"parameter": str(x["loc"][-1]), "in": str(x["loc"][0]), "message": x["msg"]}
            for x in e.errors()
        ]
        text = "; ".join(f"{x['parameter']}: {x['message']}" for x in found)
        return problem(422, "parameter-error", text, errors=found)

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, e: HTTPException) -> JSONResponse:
        kinds = {404: "not-found", 405: "method-not-allowed"}
        kind = kinds.get(e.status_code, "http-error")
        return problem(e.status_code, kind, str(e.detail), e.headers)

    @app.exception_handler(RedisError)
    async def _store(_request: Request, _e: RedisError) -> JSONResponse:
        metrics.shed("redis")
        return problem(503, "queue-away", "the queue cannot be used; instant decodes still work")

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, _e: Exception) -> JSONResponse:
        ids = {"X-Request-Id": getattr(request.state, "request_id", "")}
        return problem(500, "internal-error", "an unexpected error; it was logged", ids)


def _kind(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


EXAMPLE: JsonDict = {
    "type": "urn:afterimage:problem:checksum-mismatch",
    "title": "Checksum mismatch",
    "status": 422,
    "detail": "the bitstream's CRC-32C does not hold: its bytes were changed",
}
_MEANING = {
    400: "Empty body or truncated header",
    401: "No API key or signature, or one that is not valid",
    403: "The API key lacks the scope",
    404: "No such decode",
    406: "None of the acceptable formats can be made",
    409: "The decode's state does not allow it",
    410: "The picture is no longer kept; retry makes it again",
    413: "More bytes or declared pixels than the limit",
    415: "Unknown magic, codec or picture format",
    416: "The range begins behind the picture's end",
    422: "Wrong lengths, checksum, entropy coded bytes, id or parameter",
    429: "The caller's quota is used up",
    503: "The queue cannot be used, or too much is waiting",
    504: "The request's time is over",
}


_OF_KEYS = (401, 403, 429)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the problems that an operation may answer with, besides those of keys."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    known = sorted({*_OF_KEYS, *statuses})
    return {s: {"description": _MEANING[s], "content": content} for s in known}
