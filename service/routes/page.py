"""The web page at `/`: static files with a strict Content-Security-Policy."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; worker-src 'self'; "
    "style-src 'self'; img-src 'self'; connect-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate each time
}


class Files(StaticFiles):
    """Serves the files of the page: HTML, style, scripts and sample photographs."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parents[1] / "web")

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


files = Files()
router = APIRouter()


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """Serve the document of pictures."""
    return await files.get_response("index.html", request.scope)


@router.get("/queue", include_in_schema=False)
async def queue(request: Request) -> Response:
    """Serve the operators' view of the queue, which reads `/v1/queue`."""
    return await files.get_response("queue.html", request.scope)
