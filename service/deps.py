"""Dependencies of routes: the services, request bodies, callers, and negotiated headers."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import Depends, Header, Path, Query, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from models.tiers import TIERS
from service import auth, negotiate, parameters, uploads
from service.auth import Caller
from service.keys import Scope
from service.negotiate import Preferences
from service.services import Services


async def services_of(request: Request) -> Services:
    """The application's services."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(services_of)]


async def request_body(request: Request, services: ServicesDep) -> AsyncGenerator[bytes, None]:
    """Read the body, or the file of a multipart form, within the limits.

    Its memory counts against the upload budget until the response is sent.
    Raises `UnsupportedEncoding`, `BodyTooLarge`, `RequestTimeout`, `Busy`; for a form,
    `MalformedHeader` if it is invalid and `RequestValidationError` if it holds more than a file.
    """
    with services.uploads.upload() as reserve:
        yield await uploads.read(request, services.settings, reserve)


_BEARER = HTTPBearer(
    auto_error=False,
    description="An API key; required only if the service is configured with keys.",
)
_API_KEY_HEADER = APIKeyHeader(
    name="X-API-Key", auto_error=False, description="An API key, instead of `Authorization`."
)


@functools.cache
def require(scope: Scope, or_link: bool = False) -> Callable[..., Awaitable[Caller]]:
    """Return a dependency that authenticates the caller and checks its scope.

    `or_link` also accepts a signed link, for GET and HEAD. A service without API keys
    allows every client everything, except to operate the queue. The dependency raises
    `Unauthorized`, `Forbidden`.
    """

    async def caller(
        request: Request,
        services: ServicesDep,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_API_KEY_HEADER)],
    ) -> Caller:
        if services.keys is None:
            return auth.anonymous(request, scope)
        token = bearer.credentials if bearer else header
        if or_link and not token:
            holder = auth.link_holder(request, services.link_secret)
            if holder is not None:
                return holder
        return auth.authenticate(services.keys, token, scope)

    return caller


_QUOTA_THREADS = anyio.CapacityLimiter(8)
"""Threads that count requests; separate, so that a slow Redis does not block instant decodes."""


def within_quota(scope: Scope, or_link: bool = False) -> Callable[..., Awaitable[Caller]]:
    """Return a dependency that authenticates the caller, as `require` does, and counts the request.

    The dependency raises `Unauthorized`, `Forbidden`, `TooManyRequests`.
    """

    async def counted_caller(
        request: Request,
        services: ServicesDep,
        caller: Annotated[Caller, Depends(require(scope, or_link))],
    ) -> Caller:
        request.state.caller = caller.name
        request.state.quota = {}
        if services.quotas.limits_requests(caller):
            request.state.quota = await anyio.to_thread.run_sync(
                services.quotas.request, caller, limiter=_QUOTA_THREADS
            )
        return caller

    return counted_caller


async def event_stream(
    request: Request,
    services: ServicesDep,
    caller: Annotated[Caller, Depends(require("decode"))],
) -> AsyncGenerator[None, None]:
    """Count an event stream of the caller until it ends.

    The first dependency of its route, so that a stream beyond the limit costs nothing in Redis.
    Raises `TooManyRequests`.
    """
    request.state.caller = caller.name
    with services.waits.stream(caller.name):
        yield


def _joined(request: Request, name: str) -> str:
    """The values of all headers called `name`, joined by commas."""
    return ", ".join(request.headers.getlist(name))


async def accept_header(request: Request) -> str:
    """The header `Accept`; `negotiate.picture_format` reads it when a picture is to be sent."""
    return _joined(request, "accept")


async def prefer_header(
    request: Request,
    prefer: Annotated[  # unused, for OpenAPI only: FastAPI passes only the first of several headers
        str | None, Header(examples=["respond-async, wait=10"], description="RFC 7240.")
    ] = None,
) -> Preferences:
    """The preferences in `Prefer`."""
    return negotiate.preferences(_joined(request, "prefer"))


def tier_query(description: str) -> Any:
    """A query parameter that names a tier; the route checks it with `tiers.find`."""
    return Query(description=description, json_schema_extra={"enum": list(TIERS)})


JobId = Annotated[
    str, Path(pattern="^[0-9a-f]{32}$", examples=["3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e"])
]
ONLY_KNOWN = Depends(parameters.only_known())
"""A dependency of a router: refuses unknown query parameters."""
ONLY_KNOWN_ON_LINKS = Depends(parameters.only_known(on_link=True))
"""The same for routes that users open as links: parameters of analytics are ignored."""
EVENT_STREAM = Depends(event_stream)
RequestBody = Annotated[bytes, Depends(request_body)]
DecodeCaller = Annotated[Caller, Depends(within_quota("decode"))]
EncodeCaller = Annotated[Caller, Depends(within_quota("encode"))]
OperateCaller = Annotated[Caller, Depends(within_quota("operate"))]
ImageCaller = Annotated[Caller, Depends(within_quota("decode", or_link=True))]
"""A caller with the scope `decode`, or with a signed link to the picture."""
AcceptHeader = Annotated[str, Depends(accept_header)]
PreferHeader = Annotated[Preferences, Depends(prefer_header)]
