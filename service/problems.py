"""Errors to HTTP: RFC 9457 `application/problem+json`, one table for all of them."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.config import JsonDict
from starlette.exceptions import HTTPException

from models import errors
from worker.store import RedisError

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
"""When to come back after a store was away."""


class JobNotFound(errors.AfterimageError):
    """There is no decode with this id."""


class BodyTooLarge(errors.AfterimageError):
    """More bytes than the limit."""


STATUS: dict[type[errors.AfterimageError], int] = {
    errors.MalformedHeader: 400,
    errors.UnsupportedCodec: 415,
    errors.UnsupportedPicture: 415,
    errors.PictureTooLarge: 413,
    BodyTooLarge: 413,
    errors.BitstreamError: 422,
    errors.PictureError: 422,
    errors.ParameterError: 422,
    JobNotFound: 404,
    errors.WeightsError: 500,
    errors.AfterimageError: 500,
}


def problem(status: int, kind: str, detail: str, **extra: Any) -> JSONResponse:
    """A problem document; `kind` is the stable last part of its type."""
    body = {
        "type": f"urn:afterimage:problem:{kind}",
        "title": kind.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        **extra,
    }
    headers = {"Cache-Control": "no-store"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_S)
    return JSONResponse(body, status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""

    @app.exception_handler(errors.AfterimageError)
    async def _own(_request: Request, e: errors.AfterimageError) -> JSONResponse:
        status = next(STATUS[c] for c in type(e).__mro__ if c in STATUS)
        return problem(status, _kind(type(e).__name__), str(e))

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
        answer = problem(e.status_code, kinds.get(e.status_code, "http-error"), str(e.detail))
        answer.headers.update(e.headers or {})
        return answer

    @app.exception_handler(RedisError)
    async def _store(_request: Request, _e: RedisError) -> JSONResponse:
        return problem(503, "queue-away", "the queue cannot be used; instant decodes still work")

    @app.exception_handler(Exception)
    async def _unexpected(_request: Request, _e: Exception) -> JSONResponse:
        return problem(500, "internal-error", "an unexpected error; it was logged")


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
    404: "No such decode",
    413: "More bytes or declared pixels than the limit",
    415: "Unknown magic, codec or picture format",
    422: "Wrong lengths, checksum, entropy coded bytes or parameter",
    503: "The queue cannot be used",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the problems that an operation may answer with."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {s: {"description": _MEANING[s], "content": content} for s in statuses}
